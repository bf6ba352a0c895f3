"""Build one TensorRT engine: the program of the child process that `engines.nvinfer` starts.

A process of its own, because the builder may crash (a scale that is looked up in a table is enough), and a crash must
become an error message. In: one JSON argument, a `Job`. Out: the engine and the verbose log with the layer list; exit
status 1 and an error line in the log if the model cannot be built.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ERROR_MARK = "[E] "  # starts a log line that is an error
PARSER = f"{ERROR_MARK}parser, "


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to build; it travels to the child process as JSON.

    Attributes:
        module: TensorRT's Python module, `tensorrt` or `tensorrt_rtx`.
        onnx: Path of the ONNX file.
        beside: A path in the folder where the weights are that are not inside the ONNX file.
        engine: Path of the engine to write.
        log: Path of the log to write.
        batch: Smallest batch, the one to tune for, and largest.
        targets: GPU generations; empty means portable.
        stripped: Whether to leave out the weights.
        portable: "version" for later versions of TensorRT, "gpu" for every GPU from Ampere on.
    """

    module: str
    onnx: str
    beside: str
    engine: str
    log: str
    batch: tuple[int, int, int]
    targets: tuple[str, ...]
    stripped: bool
    portable: tuple[str, ...] = ()


def make_logger(trt: Any, log: TextIO) -> Any:
    """Return a logger that writes every message to `log` at once, so that a crash leaves the last one before it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            failed = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            log.write(f"{ERROR_MARK if failed else ''}{message}\n")
            log.flush()

    return Logger()


def make_runtime(trt: Any, logger: Any, portable: Sequence[str]) -> Any:
    """Return what loads engines, those for later versions too: they bring code that runs on the host."""
    runtime = trt.Runtime(logger)
    if "version" in portable:
        runtime.engine_host_code_allowed = True
    return runtime


def build_engine(trt: Any, job: Job, log: TextIO) -> bool:
    """Build a strongly typed engine with one batch profile and write it; return whether that worked."""
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    # Where the flag does not exist, strongly typed is the only mode: each layer computes in the type the graph says.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job.onnx).read_bytes(), job.beside):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            log.write(f"{PARSER}node {error.node_name()!r} ({error.node_operator()}): {error.desc()}\n")
        return False
    config = _builder_config(trt, builder, job)
    _set_batch(builder, network, config, job.batch)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return False
    Path(job.engine).write_bytes(serialized)
    # TensorRT-RTX has logged its layer list by now; standard TensorRT gives it to the inspector only.
    if "Layers:\n" not in Path(job.log).read_text(encoding="utf-8"):
        engine = make_runtime(trt, logger, job.portable).deserialize_cuda_engine(serialized)
        inspector = engine.create_engine_inspector()
        log.write("Layers:\n" + inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
    return True


def _builder_config(trt: Any, builder: Any, job: Job) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the layer list names no ONNX nodes
    no_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # only such engines can be captured
    if no_allocation is not None:
        config.set_flag(no_allocation)
    if job.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if "version" in job.portable:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if "gpu" in job.portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job.targets:
        config.num_compute_capabilities = len(job.targets)
        for index, target in enumerate(job.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    return config


def _set_batch(builder: Any, network: Any, config: Any, batch: Sequence[int]) -> None:
    """Give the dynamic dimensions (-1) of all inputs their smallest, tuned-for and largest size."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        dynamic |= -1 in shape
        profile.set_shape(tensor.name, *(tuple(n if size == -1 else size for size in shape) for n in batch))
    if dynamic:  # a profile without a dynamic dimension is refused
        config.add_optimization_profile(profile)


def main() -> int:
    """Build what the one command-line argument says."""
    job = Job(**json.loads(sys.argv[1]))
    with open(job.log, "w", encoding="utf-8") as log:
        return 0 if build_engine(importlib.import_module(job.module), job, log) else 1


if __name__ == "__main__":
    sys.exit(main())
