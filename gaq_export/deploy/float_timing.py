"""How much faster than float an engine is: the same backend's best float engine and it take turns, call by call."""

from dataclasses import dataclass
from pathlib import Path

import engines
from engines import Compute, EngineConfig, EngineFile
from engines.timing import time_calls
from gaq_export.deploy.record import record_of

ALIKE = 0.05  # differences up to this share are within the noise of a machine
SECONDS = 1.0  # about how long the timing takes; a slow engine is called once in a turn, however long that is
LARGEST = 1 << 30  # bytes of float weights; beyond, building and calling a float engine takes minutes


@dataclass(frozen=True, kw_only=True)
class FloatTiming:
    """Median seconds of a call of `batch` images: of an engine, and of a float engine of the same backend.

    `name` and `float_name` say what they are: "openvino, W4A8" and "openvino, float32".
    """

    batch: int
    name: str
    seconds: float
    float_name: str
    float_seconds: float

    @property
    def line(self) -> str:
        """One line for people."""
        return (
            f"{1e3 * self.seconds:.3g} ms a call of {self.batch} images, {1e3 * self.float_seconds:.3g} by "
            f"{self.float_name}: {against_float(self.seconds, self.float_seconds)}"
        )

    def to_json(self) -> dict[str, object]:
        """Return what the journal has of it."""
        return {
            "call_batch": self.batch,
            "call_seconds": {self.float_name: self.float_seconds, self.name: self.seconds},
        }


def against_float(seconds: float, float_seconds: float) -> str:
    """Return in words how fast something is that takes `seconds` where float takes `float_seconds`.

    >>> against_float(1.0, 1.9), against_float(1.2, 1.0), against_float(1.0, 1.01)
    ('1.90 x as fast as float', 'float is 1.20 x as fast here', 'as fast as float here')
    """
    ratio = float_seconds / seconds
    if abs(ratio - 1) <= ALIKE:
        return "as fast as float here"
    return f"{ratio:.2f} x as fast as float" if ratio > 1 else f"float is {1 / ratio:.2f} x as fast here"


def float_compute(backend: engines.Backend, compute: str | None) -> Compute:
    """Return the type of a fair float engine: FP16 on GPUs, elsewhere what the engine computes in outside its integers.

    Args:
        backend: of both.
        compute: what the user asked for; None for the backend's default.
    """
    return backend.computes[0] if backend.on_gpu else backend.compute(compute)


def measure(file: EngineFile, exact: Path, config: EngineConfig) -> FloatTiming:
    """Build an engine of the float graph `exact`, in its folder, and time the two.

    Args:
        file: the quantized engine, which runs here.
        exact: ONNX file, in the type that `float_compute` returns.
        config: what `file` was built with.
    """
    compute = float_compute(engines.find_backend(config.backend), config.compute)
    # Neither portable nor without its weights: it is the fastest float engine that counts.
    plain = EngineConfig(
        backend=config.backend,
        batch=config.batch,
        targets=config.targets,
        threads=config.threads,
        optimisation=config.optimisation,
        compute=compute,
        gpu=config.gpu,
    )
    built = engines.build(exact, exact.with_name("float.plan"), plain)
    name = f"{file.backend}, {record_of(file).bits}"
    float_name = f"{file.backend}, {compute}"
    with engines.open_engine(built) as float_engine, engines.open_engine(file) as engine:
        medians = time_calls({float_name: float_engine, name: engine}, config.batch[1], SECONDS)
    return FloatTiming(
        batch=config.batch[1],
        name=name,
        seconds=medians[name],
        float_name=float_name,
        float_seconds=medians[float_name],
    )
