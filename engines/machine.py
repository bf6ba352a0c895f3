"""What this machine has for engines: processor features, GPUs, installed packages."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.driver import Gpu, gpus

# Feature to what it means for an engine.
CPU_FEATURES = {
    "avx2": "8 lanes of float32",
    "avx512f": "16 lanes of float32",
    "avx512_vnni": "fast INT8 products",
    "avx_vnni": "fast INT8 products, narrow",
    "avx512_bf16": "fast bfloat16 products",
    "amx_int8": "INT8 matrix products",
    "amx_bf16": "bfloat16 matrix products",
}
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx_cu13_bindings",
    "pycuda",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found.

    Attributes:
        processor: its name.
        features: those of `CPU_FEATURES` that it has; None where the system does not tell.
        gpus: NVIDIA GPUs, none if there is no driver.
        packages: version by package name, None for those not installed.
    """

    processor: str
    features: tuple[str, ...] | None
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]


def inspect_machine() -> Machine:
    """Look at this machine; imports none of the packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags") or facts.get("Features")
    return Machine(
        processor=facts.get("model name", "unknown"),
        features=None if flags is None else tuple(name for name in CPU_FEATURES if name in flags.split()),
        gpus=gpus(),
        packages=versions(PACKAGES),
    )


def int8_sums_overflow() -> bool:
    """Return whether runtimes add products of bytes in 16 bits here, where two of 8-bit weights may be too large.

    So it is on x86 without VNNI; weights of 7 bits cannot overflow.
    """
    features = inspect_machine().features or ()
    return "avx2" in features and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(features)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, None for those not installed; imports none of them."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
