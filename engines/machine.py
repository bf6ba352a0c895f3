"""What this machine offers to engines: processor features, GPUs, installed packages and their versions."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines.driver import Gpu, gpus

# What a processor feature, by the Linux kernel's name, means for an engine.
CPU_FEATURES = {
    "avx2": "8 lanes of float32",
    "avx512f": "16 lanes of float32",
    "avx512_vnni": "fast INT8 products",
    "avx_vnni": "fast INT8 products, narrow",
    "avx512_bf16": "fast bfloat16 products",
    "amx_int8": "INT8 matrix products",
    "amx_bf16": "bfloat16 matrix products",
    "asimddp": "fast INT8 products (ARM)",
    "i8mm": "INT8 matrix products (ARM)",
    "bf16": "fast bfloat16 products (ARM)",
    "sve": "vectors of any length (ARM)",
}
# Those whose version decides what an engine computes, or whether it runs.
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt_rtx_cu13_bindings",
    "pycuda",
    "cuda-bindings",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine offers to engines.

    Attributes:
        processor: Name of the processor.
        features: Those of `CPU_FEATURES` that it has; None where the system does not list them.
        gpus: NVIDIA GPUs; none if there is no driver.
        packages: Version by package name, None for packages that are not installed.
    """

    processor: str
    features: tuple[str, ...] | None
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None]


def inspect_machine() -> Machine:
    """Describe this machine; none of the packages is imported."""
    return Machine(
        processor=_cpu_facts().get("model name", "unknown"),
        features=cpu_features(),
        gpus=gpus(),
        packages=versions(PACKAGES),
    )


def cpu_features() -> tuple[str, ...] | None:
    """Return those of `CPU_FEATURES` that this processor has; None where the system does not list them."""
    facts = _cpu_facts()
    flags = facts.get("flags") or facts.get("Features")
    return None if flags is None else tuple(name for name in CPU_FEATURES if name in flags.split())


def _cpu_facts() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []  # only Linux has it
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def int8_sums_overflow() -> bool:
    """Return whether a sum of INT8 products may overflow on this processor.

    x86 without VNNI adds pairs of byte products in 16 bits, where two products of 8-bit weights may not fit; with
    weights of 7 bits and fewer they always do.
    """
    return _int8_sums_overflow(cpu_features() or ())


def other_processor(built_on: tuple[str, ...] | None) -> str | None:
    """Return how this processor differs from the one that an engine was built on, None if in nothing that matters.

    Args:
        built_on: The features of that processor; None if they are not known, or do not matter.
    """
    here = cpu_features()
    if built_on is None or here is None or set(built_on) == set(here):
        return None
    lacks = [name for name in built_on if name not in here]
    has = [name for name in here if name not in built_on]
    parts = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(has)} besides"] * bool(has)
    overflow = _int8_sums_overflow(here) and not _int8_sums_overflow(built_on)
    return " and ".join(parts) + ("; sums of products of 8-bit weights may overflow here" if overflow else "")


def _int8_sums_overflow(features: Collection[str]) -> bool:
    return "avx2" in features and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(features)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, None for those not installed; none of them is imported."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
