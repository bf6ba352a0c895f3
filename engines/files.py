"""An engine on disk: a plan file and the JSON record beside it.

The record carries the plan's SHA-256, so a plan and a record that do not belong together (an interrupted build, an
edited file) are always noticed.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Audit, TensorSpec
from engines.errors import EngineError

FORMAT = 3


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
    check_files(file)
    return file


def check_files(file: EngineFile) -> None:
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
