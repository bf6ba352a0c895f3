"""What all engines have in common: their tensors, the options of a build, what they hold, and how they are called.

Only types live here; every other module of the package imports this one.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Protocol, Self

import numpy.typing as npt
from pydantic import NonNegativeFloat, NonNegativeInt

from engines.errors import EngineError
from engines.records import Count, DtypeName

OnStep = Callable[[int], None]  # called with the number of an iteration
# More is a slip of the finger, and runtimes take memory before they complain.
MOST_BATCH = 65_536
MOST_THREADS = 1024


class Compute(StrEnum):
    """Type of the arithmetic that is not integer, by NumPy's name."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Optimisation(StrEnum):
    """How far ONNX Runtime rewrites a graph before it runs; BASIC is for parity checks."""

    BASIC = "basic"
    ALL = "all"


class Portable(StrEnum):
    """Beyond what an engine can run: later versions of TensorRT, or every generation of GPUs from Ampere on."""

    VERSION = "version"
    GPU = "gpu"


class LayerKind(StrEnum):
    """What a layer with constant weights computes."""

    CONVOLUTION = "convolution"
    MATMUL = "matmul"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of one engine input or output; `None` in the shape is the dynamic batch."""

    name: str
    dtype: DtypeName
    shape: tuple[Count | None, ...]

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """Return the shape with the dynamic batch filled in."""
        return tuple(batch if size is None else size for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of a build.

    Attributes:
        backend: A key of `engines.BACKENDS`.
        batch: Smallest batch, the one to tune for, and largest batch that the engine accepts.
        targets: GPU generations to build for, e.g. `"sm89"`; TensorRT-RTX only, empty means portable.
        threads: CPU threads, OpenVINO and ONNX Runtime only; `None` leaves the choice to the runtime.
        optimisation: How far the graph is rewritten; ONNX Runtime only.
        compute: Type of the arithmetic that is not integer, one of the backend's `computes` (see `Compute`); None
            means the first of them. For a `typed` backend the graph must already be in this type.
        stripped: Leave the weights out of the engine; on opening they are read from the ONNX file beside it, which
            engines for other GPUs may share. TensorRT only, and only on a machine with a GPU.
        portable: Values of `Portable`: what the engine is to run beyond this version and this generation of GPUs.
            TensorRT only; TensorRT-RTX has no engines for other versions. It is built without it too, to say what it
            costs.
        gpu: Number of the GPU that standard TensorRT and ONNX Runtime build on; others do not look at it.
    """

    backend: str
    batch: tuple[int, int, int] = (1, 4, 16)
    targets: tuple[str, ...] = ()
    threads: int | None = None
    optimisation: Optimisation = Optimisation.ALL
    compute: str | None = None
    stripped: bool = False
    portable: tuple[str, ...] = ()
    gpu: int = 0

    def __post_init__(self) -> None:
        # A mistake is reported here, before a build that may take minutes.
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise EngineError(f"Batch profile {self.batch} is not in order; give 1 <= min <= best <= max.")
        if largest > MOST_BATCH:
            raise EngineError(f"Found a batch of {largest}; give {MOST_BATCH} at most.")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise EngineError(f"Found threads={self.threads}; give 1 to {MOST_THREADS}, or leave it out.")
        # The options may come from JSON or a command line, as plain strings.
        if self.optimisation not in tuple(Optimisation):
            choices = [str(level) for level in Optimisation]
            raise EngineError(f"Unknown optimisation {self.optimisation!r}. Choose one of {choices}.")
        object.__setattr__(self, "optimisation", Optimisation(self.optimisation))
        if unknown := [kind for kind in self.portable if kind not in tuple(Portable)]:
            raise EngineError(f"Unknown portable {unknown}. Choose from {[str(kind) for kind in Portable]}.")
        object.__setattr__(self, "portable", tuple(dict.fromkeys(self.portable)))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One layer with constant weights; `precision` is the dtype that it multiplies in, or "unknown"."""

    name: str
    kind: LayerKind
    precision: str


@dataclass(frozen=True, kw_only=True)
class PortabilityCost:
    """What being portable costs an engine.

    Attributes:
        bytes: Size of the engine.
        plain_bytes: Size of the same engine built without it.
        seconds: Median of a call of the engine; None where it cannot run.
        plain_seconds: The same of the other.
    """

    bytes: NonNegativeInt
    plain_bytes: NonNegativeInt
    seconds: NonNegativeFloat | None = None
    plain_seconds: NonNegativeFloat | None = None

    def __str__(self) -> str:
        """Return it as a phrase."""
        size = f"{self.bytes / 1e6:.2f} MB in place of {self.plain_bytes / 1e6:.2f}"
        if self.seconds is None or self.plain_seconds is None:
            return f"{size}; time not measured, since it cannot run here"
        return f"{size}; {1e3 * self.seconds:.3g} ms a call in place of {1e3 * self.plain_seconds:.3g}"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the runtime says an engine computes and holds.

    Products of two activations (attention) are not weight layers and do not appear. A layer that the runtime does not
    mention has precision "unknown".

    Attributes:
        kernels: One for each layer with constant weights.
        weight_bytes: Bytes of weights that the engine holds, by element type ("int4", "int8", "float32"), or under
            "total" if the runtime does not split them.
        note: How to read `weight_bytes`.
        portability: What being portable costs; None for an engine that was not to be portable.
    """

    kernels: tuple[Kernel, ...]
    weight_bytes: dict[str, NonNegativeInt]
    note: str = ""
    portability: PortabilityCost | None = None

    @property
    def total_weight_bytes(self) -> int:
        """Bytes of all weights together."""
        return sum(self.weight_bytes.values())

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """Number of layers by (kind, precision)."""
        return dict(Counter((kernel.kind, kernel.precision) for kernel in self.kernels))

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return asdict(self) | {"kernels": [asdict(kernel) for kernel in self.kernels]}


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How an engine runs on its own outputs.

    Attributes:
        count: Number of iterations.
        feedback: Output name to the name of the input that it becomes in the next iteration.
        noise: Input name to one seed for each row: iteration i gets `philox.normals(seeds, i + 1, ...)`.
        on_step: Called with the number of each iteration; on a GPU when the iteration is launched, which may be
            before it runs.
        first: Number of the first iteration, for a loop that continues another.
    """

    count: int
    feedback: Mapping[str, str]
    noise: Mapping[str, Sequence[int]] = field(default_factory=dict)
    on_step: OnStep = lambda step: None
    first: int = 0


# A protocol and not a base class: `OpenEngine` and `EngineSwitch` share these methods and no code.
class Engine(Protocol):
    """A built network that can be called: NumPy arrays by input name in, NumPy arrays by output name out."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a call must feed."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs a call returns."""

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run the network once; raises EngineError as `engines.runner.check_feeds` says."""

    def loop(self, feeds: Mapping[str, npt.NDArray[Any]], loop: Loop) -> dict[str, npt.NDArray[Any]]:
        """Run the network on its own outputs; memory is allocated once, and a GPU does not wait between iterations.

        Args:
            feeds: Inputs of the first iteration; those in `loop.noise` may be left out.
            loop: How many iterations, and what goes from one to the next.

        Returns:
            The outputs of the last iteration.

        Raises:
            EngineError: See `engines.runner.check_feeds` and `check_loop`.
        """

    def close(self) -> None:
        """Release the runtime's memory; closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
