"""Which TensorRT runs on which generation of NVIDIA's GPUs, by compute capability, so that it is known beforehand.

TensorRT-RTX is for GPUs that have displays; on data-centre Hopper and Blackwell it refuses to run (seen on an H100).
Standard TensorRT is for all from Turing on.
"""

from dataclasses import dataclass

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generation of GPUs: its compute capabilities, the backends that run on it, and a note on INT8 if there is one.

    The note is one line with `{gpu}` where the name of the GPU goes.
    """

    name: str
    capabilities: tuple[str, ...]
    backends: tuple[str, ...]
    note: str | None = None


_FP8_IS_FASTER = "INT8 is not the fast path of the {gpu}: FP8 is, with build-engine --backend tensorrt --numbers fp8"
GENERATIONS = (
    Generation(
        name="Turing",
        capabilities=("7.5",),
        backends=(TENSORRT, TENSORRT_RTX),
        # By the builder's layer list for sm75.
        note="TensorRT-RTX computes convolutions of INT8 in FP16 on the {gpu}, and needs build-engine --target sm75",
    ),
    Generation(name="Ampere", capabilities=("8.0", "8.6", "8.7"), backends=(TENSORRT, TENSORRT_RTX)),
    Generation(name="Ada", capabilities=("8.9",), backends=(TENSORRT, TENSORRT_RTX)),
    Generation(name="Hopper", capabilities=("9.0",), backends=(TENSORRT,)),
    Generation(
        name="Blackwell of data centres", capabilities=("10.0", "10.3"), backends=(TENSORRT,), note=_FP8_IS_FASTER
    ),
    Generation(name="Blackwell", capabilities=("12.0", "12.1"), backends=(TENSORRT, TENSORRT_RTX)),
)


def generation_of(capability: str) -> Generation | None:
    """Return the generation of a compute capability such as "8.9"; None if it is of none in the table."""
    return next((one for one in GENERATIONS if capability in one.capabilities), None)


def cannot_run(gpu: str, capability: str, backend: str) -> str | None:
    """Return in one line why a backend does not run on a GPU, and what does; None if it does, or is not known not to.

    Args:
        gpu: Name of the GPU.
        capability: Its compute capability.
        backend: `TENSORRT` or `TENSORRT_RTX`.
    """
    generation = generation_of(capability)
    if generation is None and _number(capability) > _number(GENERATIONS[0].capabilities[0]):  # newer than the table
        return None
    if generation is not None and backend in generation.backends:
        return None
    instead = generation.backends[0] if generation else "onnxruntime-cuda"
    return f"{backend} does not run on the {gpu} (compute capability {capability}): use {instead}"


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def advice(gpu: str, capability: str) -> str | None:
    """Return what a user should know of a GPU before quantizing for it, in one line; None if there is nothing."""
    generation = generation_of(capability)
    if generation is None:
        return cannot_run(gpu, capability, TENSORRT)
    parts = [cannot_run(gpu, capability, TENSORRT_RTX), generation.note and generation.note.format(gpu=gpu)]
    return ". ".join(part for part in parts if part) or None
