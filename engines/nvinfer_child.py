"""Build one TensorRT engine; run as a process of its own because the builder can take the process down with it.

In: one JSON argument (the TensorRT module to import, the ONNX file, a path beside the files with weights that are not
in it, the plan to write, the log to write, the batch profile, the targets, whether to leave out the weights). Out: the
plan, the verbose log with the layer list, and exit status 1 with an error line in the log when the model cannot be
built.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, TextIO

ERROR_MARK = "[E] "
PARSER = f"{ERROR_MARK}parser, "


def make_logger(trt: Any, log: TextIO) -> Any:
    """Return a logger that writes every message to `log` at once, so that a crash leaves its last words."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            failed = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            log.write(f"{ERROR_MARK if failed else ''}{message}\n")
            log.flush()

    return Logger()


def build_plan(trt: Any, job: dict[str, Any], log: TextIO) -> bool:
    """Build strongly typed, with one batch profile, and write the plan; say whether it worked."""
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only mode where absent
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job["onnx"]).read_bytes(), job["beside"]):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            log.write(f"{PARSER}node {error.node_name()!r} ({error.node_operator()}): {error.desc()}\n")
        return False
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    no_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # what a captured CUDA graph needs
    if no_allocation is not None:
        config.set_flag(no_allocation)
    if job["stripped"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if job["targets"]:
        config.num_compute_capabilities = len(job["targets"])
        for index, target in enumerate(job["targets"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        dynamic |= -1 in shape
        profile.set_shape(tensor.name, *(tuple(n if size == -1 else size for size in shape) for n in job["batch"]))
    if dynamic:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return False
    Path(job["plan"]).write_bytes(plan)
    if "Layers:\n" not in Path(job["log"]).read_text(encoding="utf-8"):  # standard TensorRT keeps it for the inspector
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        inspector = engine.create_engine_inspector()
        log.write("Layers:\n" + inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))
    return True


def main() -> int:
    """Run the job given as the one command-line argument."""
    job = json.loads(sys.argv[1])
    with open(job["log"], "w", encoding="utf-8") as log:
        return 0 if build_plan(importlib.import_module(job["module"]), job, log) else 1


if __name__ == "__main__":
    sys.exit(main())
