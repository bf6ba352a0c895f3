"""What every engine has in common: its tensors, how it was asked for, what it holds, and the file it lives in.

In: an engine's plan file and the JSON record beside it. Out: a checked `EngineFile`. The record carries the plan's
SHA-256, so a plan and a record that do not belong together (an interrupted build, an edited file) are always noticed.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from engines.errors import EngineError

FORMAT = 3
OPTIMISATIONS = ("basic", "all")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of one engine input or output; `None` in the shape is the dynamic batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """Return the shape with the dynamic batch filled in."""
        return tuple(batch if size is None else size for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the user asked of a build.

    Attributes:
        backend: A key of `engines.BACKENDS`.
        batch: Smallest, best (tuned for) and largest batch the engine accepts.
        targets: GPU generations to build for, e.g. `"sm89"`; TensorRT-RTX only, empty means portable.
        threads: CPU threads, OpenVINO and ONNX Runtime only; `None` leaves the choice to the runtime.
        optimisation: ONNX Runtime graph optimisation, `"basic"` (for parity checks) or `"all"`.
        compute: Type of the arithmetic that is not integer, one of the backend's `computes`; its first if None. Where
            the backend is `typed` the graph must already be in it.
        stripped: Leave the weights out of the plan; when it is opened they are read from the ONNX file beside it, which
            plans for other GPUs may share. TensorRT only, and only where there is a GPU.
    """

    backend: str
    batch: tuple[int, int, int] = (1, 4, 16)
    targets: tuple[str, ...] = ()
    threads: int | None = None
    optimisation: str = "all"
    compute: str | None = None
    stripped: bool = False

    def __post_init__(self) -> None:
        smallest, best, largest = self.batch
        if not 1 <= smallest <= best <= largest:
            raise EngineError(f"Batch profile {self.batch} is not in order; give 1 <= min <= best <= max.")
        if self.threads is not None and self.threads < 1:
            raise EngineError(f"Found threads={self.threads}; give 1 or more, or leave it out.")
        if self.optimisation not in OPTIMISATIONS:
            raise EngineError(f"Unknown optimisation {self.optimisation!r}. Choose one of {list(OPTIMISATIONS)}.")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One layer with constant weights: `kind` "convolution" or "matmul", `precision` the dtype it multiplies in."""

    name: str
    kind: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an engine runs and holds.

    Products of two activations (attention) are not weight layers and are left out. A layer the runtime does not
    mention has precision "unknown".

    Attributes:
        kernels: One entry per layer with constant weights.
        weight_bytes: Bytes the engine holds, by element type ("int4", "int8", "float32", or "total" if not split).
        note: How to read `weight_bytes`.
    """

    kernels: tuple[Kernel, ...]
    weight_bytes: dict[str, int]
    note: str = ""

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

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; a KeyError, TypeError or ValueError means the record is damaged."""
        return cls(
            kernels=tuple(Kernel(**kernel) for kernel in record["kernels"]),
            weight_bytes={str(dtype): int(size) for dtype, size in record["weight_bytes"].items()},
            note=str(record["note"]),
        )


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """A plan file and what its record says of it. The record is `<path>.json`; `about` is the caller's own JSON.

    `weights` is the SHA-256 of the ONNX file `<path>.onnx` that holds a stripped plan's weights, None if the plan does;
    `data` that of `<path>.data`, where the weights of a plan that is an ONNX graph lie if they are beyond 2 GB.
    """

    path: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]
    sha256: str
    audit: Audit
    build_seconds: float
    about: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    threads: int | None = None
    optimisation: str = "all"
    compute: str = "float32"
    weights: str | None = None
    data: str | None = None

    def save(self) -> Path:
        """Write the record beside the plan, all or nothing, and return its path."""
        record = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        record["inputs"] = [asdict(spec) for spec in self.inputs]
        record["outputs"] = [asdict(spec) for spec in self.outputs]
        record["audit"] = self.audit.to_json()
        path = record_path(self.path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path


def record_path(plan: Path) -> Path:
    """Return where the JSON record of a plan file lives."""
    return plan.with_name(plan.name + ".json")


def weights_path(plan: Path) -> Path:
    """Return where the weights of a stripped plan live."""
    return plan.with_name(plan.name + ".onnx")


def data_path(plan: Path) -> Path:
    """Return where the weights of a plan lie that are too large for it."""
    return plan.with_name(plan.name + ".data")


def files_of(plan: Path) -> list[Path]:
    """Return all files that an engine may consist of, whether they are there or not; the record is the last."""
    return [data_path(plan), weights_path(plan), plan, record_path(plan)]


def load_engine_file(path: str | Path) -> EngineFile:
    """Read and check the record of a plan file.

    Args:
        path: The plan file (`unet.plan`); its record is expected beside it (`unet.plan.json`).

    Raises:
        EngineError: The plan or the record is missing, damaged, of another format, or the two do not match.
    """
    plan = Path(path)
    where = record_path(plan)
    try:
        record = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"Cannot read the engine record {where}: {error.strerror}. Build the engine again.") from None
    except ValueError as error:
        raise EngineError(f"The engine record {where} is not JSON ({error}). Build the engine again.") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise EngineError(f"{where} has format {found!r}, this version reads {FORMAT}. Build the engine again.")
    expected = {"format"} | {f.name for f in fields(EngineFile)} - {"path"}
    if record.keys() != expected:
        odd = f"missing keys {sorted(expected - record.keys())}, unknown keys {sorted(record.keys() - expected)}"
        raise EngineError(f"{where} has {odd}. Build the engine again.")
    try:
        file = _from_record(plan, record)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{where} holds a value of the wrong kind ({error!r}). Build the engine again.") from None
    check_plan(file)
    return file


def check_plan(file: EngineFile) -> None:
    """Compare the plan, and its weights if they lie apart, with the record.

    Raises:
        EngineError: A file cannot be read, or its SHA-256 differs from the record's.
    """
    parts = ("plan", file.path, file.sha256), ("weights", data_path(file.path), file.data)
    for what, path, sha256 in parts:
        if sha256 is not None:
            _check(what, path, sha256)


def read_weights(file: EngineFile) -> bytes | None:
    """Return the ONNX file with a stripped plan's weights, None if the plan has its own.

    Raises:
        EngineError: The file cannot be read, or its SHA-256 differs from the record's.
    """
    if file.weights is None:
        return None
    _check("weights", weights_path(file.path), file.weights)
    return weights_path(file.path).read_bytes()


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 without reading it into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(what: str, path: Path, sha256: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise EngineError(f"Cannot read the {what} {path}: {error.strerror}. Build the engine again.") from None
    if found != sha256:
        raise EngineError(
            f"The {what} {path} has SHA-256 {found[:12]}..., its record says {sha256[:12]}...: "
            "truncated, edited or half-written. Build the engine again."
        )


def _from_record(plan: Path, record: dict[str, Any]) -> EngineFile:
    """Turn JSON values back into the dataclass; raises KeyError, TypeError or ValueError on wrong ones."""

    def specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=r["name"], dtype=np.dtype(r["dtype"]).name, shape=tuple(r["shape"])) for r in rows)

    smallest, best, largest = (int(n) for n in record["batch"])
    return EngineFile(
        path=plan,
        backend=str(record["backend"]),
        inputs=specs(record["inputs"]),
        outputs=specs(record["outputs"]),
        batch=(smallest, best, largest),
        sha256=str(record["sha256"]),
        audit=Audit.from_json(record["audit"]),
        build_seconds=float(record["build_seconds"]),
        about=dict(record["about"]),
        targets=tuple(record["targets"]),
        threads=None if record["threads"] is None else int(record["threads"]),
        optimisation=str(record["optimisation"]),
        compute=str(record["compute"]),
        weights=None if record["weights"] is None else str(record["weights"]),
        data=None if record["data"] is None else str(record["data"]),
    )


class Engine(Protocol):
    """A built network that can be called: NumPy arrays by input name in, NumPy arrays by output name out."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a call must feed."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs a call returns."""

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run the network once; see `engines.running.check_feeds` for what is refused."""

    def loop(
        self,
        feeds: Mapping[str, npt.NDArray[Any]],
        count: int,
        feedback: Mapping[str, str],
        noise: Mapping[str, Sequence[int]] = ...,
        on_step: Callable[[int], None] = ...,
        first: int = ...,
    ) -> dict[str, npt.NDArray[Any]]:
        """Run the network on its own outputs, all memory made once, on a GPU without waiting between iterations.

        Args:
            feeds: The first iteration's inputs; those in `noise` may be left out.
            count: How many iterations.
            feedback: Output name to the name of the input that it becomes in the next iteration.
            noise: Input name to one seed a row: iteration i gets `philox.normals(seeds, i + 1, ...)`.
            on_step: Told each iteration's number; on a GPU when it is asked for, which may be before it runs.
            first: Number of the first iteration, for a loop that goes on where another stopped.

        Returns:
            The last iteration's outputs.

        Raises:
            EngineError: see `engines.running.check_feeds` and `check_loop`.
        """

    def close(self) -> None:
        """Release the runtime's memory; closing twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
