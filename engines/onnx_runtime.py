"""ONNX Runtime, on the CPU or on an NVIDIA GPU: the engine is the ONNX file itself, weights beyond 2 GB beside it.

On the GPU (its CUDA execution provider) there are no INT8 convolutions: integers are turned back into floats and
computed with in FP16. That is for machines without TensorRT, and for comparison.
"""

import importlib.util
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx

from engines import philox
from engines.base import Audit, EngineConfig, Kernel, Loop, Optimisation
from engines.driver import no_gpu
from engines.errors import EngineError
from engines.files import EngineFile
from engines.graph import MATRIX_OPS, OnnxGraph, initializer_bytes, weight_layers
from engines.runner import Arrays, OpenEngine


class Device(StrEnum):
    """Where ONNX Runtime computes, by its own names."""

    CPU = "cpu"
    CUDA = "cuda"


_LEVELS = {Optimisation.BASIC: "ORT_ENABLE_BASIC", Optimisation.ALL: "ORT_ENABLE_ALL"}
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_ERRORS_ONLY = 3  # log severity


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a session computes: the kind of device, and the number of the GPU if it is one."""

    device: Device
    gpu: int

    @property
    def number(self) -> int:
        """The device's number, as ONNX Runtime has it; of CPUs there is one."""
        return self.gpu if self.device is Device.CUDA else 0

    @property
    def providers(self) -> list[str | tuple[str, dict[str, str]]]:
        """What ONNX Runtime computes with."""
        # Operators without a CUDA kernel fall back to the CPU.
        return [_CPU] if self.device is Device.CPU else [(_CUDA, {"device_id": str(self.number)}), _CPU]


def missing(gpu: int = 0) -> str | None:
    """Return the reason why ONNX Runtime cannot be used here, on the CPU, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install onnxruntime"
    return None


def missing_cuda(gpu: int = 0) -> str | None:
    """Return the reason why ONNX Runtime cannot be used on the GPU of this number, or None."""
    if problem := missing() or no_gpu(gpu):
        return problem
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        return "this ONNX Runtime is for CPUs: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return None


def build(graph: OnnxGraph, path: Path, config: EngineConfig, *, device: Device) -> Audit:
    """Write the engine, and audit the graph that ONNX Runtime's optimiser makes of it.

    Raises:
        EngineError: ONNX Runtime cannot load the model.
    """
    graph.save(path)
    with tempfile.TemporaryDirectory() as folder:
        optimised_path = Path(folder, "optimised.onnx")
        options = _session_options(config.threads, config.optimisation)
        options.optimized_model_filepath = str(optimised_path)
        # Weights of the optimised graph go to another file, since only their types and shapes are read here.
        external = {"file_name": f"{optimised_path.name}.data", "min_size_in_bytes": "1024"}
        for key, value in external.items():
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
        _session(path, Place(device=device, gpu=config.gpu), options)
        optimised = onnx.load(optimised_path, load_external_data=False)
    # ONNX Runtime does not report its kernels, but the graph that its optimiser leaves says the same:
    # an integer operator in the optimised graph computes in integers; a float one after DequantizeLinear does not.
    kernels = []
    for name, node in weight_layers(optimised).items():
        kind, _, precision = MATRIX_OPS[node.op_type]
        kernels.append(Kernel(name=name, kind=kind, precision=precision or str(config.compute)))
    memory = ", ".join(f"{dtype} {size}" for dtype, size in sorted(initializer_bytes(optimised).items()))
    return Audit(
        kernels=tuple(kernels),
        weight_bytes=initializer_bytes(graph.model),
        note=f"Bytes as stored in the engine. After ONNX Runtime's optimiser the weights are: {memory}.",
    )


def open_file(file: EngineFile, *, device: Device) -> OpenEngine:
    """Load an engine into a session.

    Raises:
        EngineError: ONNX Runtime cannot load it.
    """
    place = Place(device=device, gpu=file.gpu)
    session = _session(file.path, place, _session_options(file.threads, file.optimisation))
    return OpenEngine(file, _SessionRunner(file, session, place))


class _SessionRunner:
    """An `engines.runner.Runner`: all tensors stay on the device, and swap places between iterations.

    Args:
        file: The engine that is opened.
        session: The session that holds it.
        place: Where the session computes.
    """

    def __init__(self, file: EngineFile, session: Any, place: Place) -> None:
        self._file = file
        self._session = session
        self._place = place.device.value, place.number

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""
        inputs, outputs = self._inputs(feeds), self._outputs(batch)
        self._infer(inputs, outputs)
        return _arrays(outputs)

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""
        inputs, outputs = self._inputs(feeds), self._outputs(batch)
        for i in range(loop.count):
            if i:  # an output becomes the input without a copy; the old input is what the next output overwrites
                for output, name in loop.feedback.items():
                    inputs[name], outputs[output] = outputs[output], inputs[name]
            for name, seeds in loop.noise.items():
                inputs[name].update_inplace(philox.normals(seeds, loop.first + i + 1, feeds[name].shape[1:]))
            loop.on_step(loop.first + i)
            self._infer(inputs, outputs)
        return _arrays(outputs)

    def free(self) -> None:
        """Release the memory of the session."""
        del self._session

    def _infer(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        # A new binding each time, since inputs and outputs swap places; it copies no data.
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._session.run_with_iobinding(binding)

    def _inputs(self, feeds: Arrays) -> dict[str, Any]:
        from onnxruntime import OrtValue

        return {name: OrtValue.ortvalue_from_numpy(array.copy(), *self._place) for name, array in feeds.items()}

    def _outputs(self, batch: int) -> dict[str, Any]:
        from onnxruntime import OrtValue

        make = OrtValue.ortvalue_from_shape_and_type
        return {spec.name: make(spec.at_batch(batch), spec.dtype, *self._place) for spec in self._file.outputs}


def _arrays(values: dict[str, Any]) -> Arrays:
    """Copy to the host; on the CPU `numpy()` is a view of memory that is freed together with the value."""
    return {name: value.numpy().copy() for name, value in values.items()}


def _session_options(threads: int | None, optimisation: Optimisation) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimisation])
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _session(engine: Path, place: Place, options: Any) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    try:
        session = onnxruntime.InferenceSession(engine, options, providers=place.providers)
    except (  # they share no base below Exception
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.InvalidProtobuf,
        failures.NotImplemented,
        failures.RuntimeException,
    ) as error:
        raise EngineError(f"onnxruntime cannot load this model: {str(error).splitlines()[0]}") from None
    # It only logs that its part for the GPU did not load.
    if place.device is Device.CUDA and session.get_providers()[0] != _CUDA:
        raise EngineError("onnxruntime could not load its CUDA libraries; they must fit its version (see its log).")
    return session
