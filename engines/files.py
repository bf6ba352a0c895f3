"""An engine on disk: the file that the runtime loads, and the JSON record beside it.

The record carries the SHA-256 of every other file and of itself, so that files which do not belong together (an
interrupted build, an edited file) are always noticed. In: an engine's path, `unet.plan` by default. Out: an
`EngineFile`, checked.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat

from engines.base import Audit, Compute, Optimisation, Portable, TensorSpec
from engines.errors import EngineError
from engines.leftovers import temporary_name
from engines.records import Count, Sha256, parse_record

FORMAT = 7  # of the record; raised when an older one can no longer be read


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """An engine file and what its record `<path>.json` says of it.

    Attributes:
        path: The file that the runtime loads.
        backend: A key of `engines.BACKENDS`.
        inputs: What a call takes, in the order of the graph.
        outputs: What a call returns.
        batch: Smallest batch, the one it is tuned for, and largest.
        sha256: Checksum of the file at `path`.
        audit: What the runtime says it computes and holds.
        build_seconds: How long the build took.
        metadata: The caller's JSON; this package stores it and does not read it.
        targets: GPU generations it was built for; empty means portable.
        portable: What it can run beyond the version of TensorRT and the generation of GPUs that it was built with.
        threads: CPU threads; None leaves the choice to the runtime.
        optimisation: How far ONNX Runtime rewrites the graph.
        compute: Type of the arithmetic that is not integer.
        weights: SHA-256 of `<path>.onnx`, which holds the weights of a stripped engine; None if the engine holds them.
        data: SHA-256 of `<path>.data`, which holds the weights of an engine that is an ONNX graph of more than 2 GB;
            None if there is no such file.
        processor: Features of the processor it was built on (`machine.CPU_FEATURES`), because CPU runtimes choose
            kernels by them; None for engines of GPUs, or where the system does not list them.
        gpu: Number of the GPU to open it on, where its backend runs on GPUs. It is of this machine, so the record does
            not have it.
    """

    path: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[int, int, int]
    sha256: str
    audit: Audit
    build_seconds: float
    metadata: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    portable: tuple[Portable, ...] = ()
    threads: int | None = None
    optimisation: Optimisation = Optimisation.ALL
    compute: Compute = Compute.FLOAT32
    weights: str | None = None
    data: str | None = None
    processor: tuple[str, ...] | None = None
    gpu: int = 0

    def save(self) -> Path:
        """Write the record beside the engine, whole or not at all, and return its path."""
        here_only = ("path", "gpu")
        record = {"format": FORMAT} | {f.name: getattr(self, f.name) for f in fields(self) if f.name not in here_only}
        record["inputs"] = [asdict(spec) for spec in self.inputs]
        record["outputs"] = [asdict(spec) for spec in self.outputs]
        record["audit"] = self.audit.to_json()
        record["record_sha256"] = record_digest(record)
        path = record_path(self.path)
        # Half a record would look like a damaged engine, so the old one stays until the new one is whole.
        temporary = path.with_name(temporary_name(path.parent, path.name))
        try:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise EngineError(f"Cannot write {path}: {error.strerror}. Choose a folder you may write to.") from None
        return path


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What is in the record: its format and own checksum, and an `EngineFile` without its path and GPU."""

    format: int
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: tuple[Count, Count, Count]
    sha256: Sha256
    audit: Audit
    build_seconds: NonNegativeFloat
    metadata: dict[str, Any]
    targets: tuple[str, ...]
    portable: tuple[Portable, ...]
    threads: Count | None
    optimisation: Optimisation
    compute: Compute
    weights: Sha256 | None
    data: Sha256 | None
    processor: tuple[str, ...] | None
    record_sha256: Sha256


def record_digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything in a record but this checksum, however the JSON is laid out."""
    others = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def record_path(engine: Path) -> Path:
    """Return the path of an engine's JSON record."""
    return engine.with_name(engine.name + ".json")


def weights_path(engine: Path) -> Path:
    """Return the path of the ONNX file that holds the weights of a stripped engine."""
    return engine.with_name(engine.name + ".onnx")


def data_path(engine: Path) -> Path:
    """Return the path of the weights that do not fit into an engine which is an ONNX graph."""
    return engine.with_name(engine.name + ".data")


def files_of(engine: Path) -> list[Path]:
    """Return the paths of all files an engine may consist of, whether they exist or not; the record is the last."""
    # In the order in which they are written: what an engine needs is there before the engine is.
    return [data_path(engine), weights_path(engine), engine, record_path(engine)]


def load_engine_file(path: str | Path) -> EngineFile:
    """Read an engine's record and check the engine against it.

    Args:
        path: The engine (`unet.plan`); its record is expected beside it (`unet.plan.json`).

    Raises:
        EngineError: The engine or its record is missing, damaged or of another format, or the two do not match.
    """
    engine = Path(path)
    if engine.is_dir():
        raise EngineError(f"{engine} is a folder; give the engine's file, such as {engine / 'unet.plan'}.")
    where = record_path(engine)
    try:
        text = where.read_bytes()
    except OSError as error:
        raise EngineError(f"Cannot read the engine record {where}: {error.strerror}. Build the engine again.") from None
    advice = "Build the engine again"
    content = parse_record(dict[str, Any], text, where, advice)
    # The format first: a record of another version must not be half understood.
    if (version := content.get("format")) != FORMAT:
        raise EngineError(f"{where} has format {version!r}, this version reads {FORMAT}. {advice}.")
    record = parse_record(_Record, text, where, advice)
    if record.batch != tuple(sorted(record.batch)):
        raise EngineError(f"{where}: batch is {list(record.batch)}, expected least, best and most in order. {advice}.")
    if record.record_sha256 != record_digest(content):
        raise EngineError(f"{where} was edited since it was written (its own SHA-256 differs). {advice}.")
    values = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in ("format", "record_sha256")}
    file = EngineFile(path=engine, **values)
    check_files(file)
    return file


def check_files(file: EngineFile) -> None:
    """Compare the engine, and its weights if they are in another file, with the record.

    Raises:
        EngineError: A file cannot be read, or its SHA-256 differs from the record's.
    """
    _check("engine", file.path, file.sha256)
    if file.data is not None:
        _check("weights", data_path(file.path), file.data)


def read_weights(file: EngineFile) -> bytes | None:
    """Return the bytes of the ONNX file with a stripped engine's weights, None if the engine holds its weights.

    Raises:
        EngineError: The file cannot be read, or its SHA-256 differs from the record's.
    """
    if file.weights is None:
        return None
    _check("weights", weights_path(file.path), file.weights)
    return weights_path(file.path).read_bytes()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, without reading the whole file into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(what: str, path: Path, sha256: str) -> None:
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise EngineError(f"Cannot read the {what} {path}: {error.strerror}. Build the engine again.") from None
    if actual != sha256:
        raise EngineError(
            f"The {what} {path} has SHA-256 {actual[:12]}..., its record says {sha256[:12]}...: "
            "truncated, edited or half-written. Build the engine again."
        )
