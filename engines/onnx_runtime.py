"""ONNX Runtime, on the CPU or on an NVIDIA GPU: the plan is the ONNX file itself, weights beyond 2 GB beside it.

On the GPU (its CUDA execution provider) there are no INT8 convolutions: what is rounded to integers is made floats
again and computed in FP16. It is for machines without TensorRT, and for comparison.
"""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import onnx

from engines import philox
from engines.base import Audit, EngineConfig, Kernel, Loop
from engines.driver import no_gpu
from engines.errors import EngineError
from engines.files import EngineFile
from engines.graph import MATRIX_OPS, OnnxGraph, initializer_bytes, weight_layers
from engines.runner import Arrays, OpenEngine

_LEVELS = {"basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_ERRORS_ONLY = 3


def missing() -> str | None:
    """Return why ONNX Runtime cannot be used here, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed: pip install onnxruntime"
    return None


def missing_cuda() -> str | None:
    """Return why ONNX Runtime cannot be used on a GPU here, or None."""
    if problem := missing() or no_gpu():
        return problem
    import onnxruntime

    if _PROVIDERS["cuda"][0] not in onnxruntime.get_available_providers():
        return "this ONNX Runtime is for CPUs: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    return None


def build(graph: OnnxGraph, plan: Path, config: EngineConfig, *, device: str) -> Audit:
    """Write the plan and audit the graph ONNX Runtime's optimiser makes of it."""
    graph.save(plan)
    with tempfile.TemporaryDirectory() as folder:
        optimised_path = Path(folder, "optimised.onnx")
        _session(plan, device, config.threads, config.optimisation, optimised_path)
        optimised = onnx.load(optimised_path, load_external_data=False)
    # Integer operators that survive in the optimised graph run as such; a float one fed by DequantizeLinear does not.
    kernels = []
    for name, node in weight_layers(optimised).items():
        kind, _, precision = MATRIX_OPS[node.op_type]
        kernels.append(Kernel(name=name, kind=kind, precision=precision or str(config.compute)))
    memory = ", ".join(f"{dtype} {size}" for dtype, size in sorted(initializer_bytes(optimised).items()))
    return Audit(
        kernels=tuple(kernels),
        weight_bytes=initializer_bytes(graph.model),
        note=f"Bytes as stored in the plan. After ONNX Runtime's optimiser the weights are: {memory}.",
    )


def open_file(file: EngineFile, *, device: str) -> OpenEngine:
    """Make a session of the plan."""
    session = _session(file.path, device, file.threads, file.optimisation)
    return OpenEngine(file, _SessionRunner(file, session, device))


class _SessionRunner:
    """An `engines.runner.Runner`: all tensors stay on the device, and change places between iterations.

    Args:
        file: what was opened.
        session: of its plan.
        device: "cpu" or "cuda".
    """

    def __init__(self, file: EngineFile, session: Any, device: str) -> None:
        self._file, self._session, self._device = file, session, device

    def run(self, feeds: Arrays, batch: int) -> Arrays:
        """Run once and return fresh arrays by output name."""
        inputs, outputs = self._inputs(feeds), self._outputs(batch)
        self._infer(inputs, outputs)
        return _arrays(outputs)

    def loop(self, feeds: Arrays, batch: int, loop: Loop) -> Arrays:
        """Run `loop.count` times and return the last outputs."""
        inputs, outputs = self._inputs(feeds), self._outputs(batch)
        for i in range(loop.count):
            if i:
                for output, name in loop.feedback.items():
                    inputs[name], outputs[output] = outputs[output], inputs[name]
            for name, seeds in loop.noise.items():
                inputs[name].update_inplace(philox.normals(seeds, loop.first + i + 1, feeds[name].shape[1:]))
            loop.on_step(loop.first + i)
            self._infer(inputs, outputs)
        return _arrays(outputs)

    def free(self) -> None:
        """Release what the runtime holds."""
        del self._session

    def _infer(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        self._session.run_with_iobinding(binding)

    def _inputs(self, feeds: Arrays) -> dict[str, Any]:
        from onnxruntime import OrtValue

        return {name: OrtValue.ortvalue_from_numpy(array.copy(), self._device, 0) for name, array in feeds.items()}

    def _outputs(self, batch: int) -> dict[str, Any]:
        from onnxruntime import OrtValue

        make = functools.partial(OrtValue.ortvalue_from_shape_and_type, device_type=self._device)
        return {spec.name: make(spec.at_batch(batch), spec.dtype) for spec in self._file.outputs}


def _arrays(values: dict[str, Any]) -> Arrays:
    """Copy to the host: on the CPU `numpy()` is a view of memory that goes with the value."""
    return {name: value.numpy().copy() for name, value in values.items()}


def _session(plan: Path, device: str, threads: int | None, optimisation: str, optimised: Path | None = None) -> Any:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimisation])
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        for key, value in {"file_name": f"{optimised.name}.data", "min_size_in_bytes": "1024"}.items():
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    try:
        session = onnxruntime.InferenceSession(plan, options, providers=_PROVIDERS[device])
    except (  # they share no base below Exception
        failures.Fail,
        failures.InvalidArgument,
        failures.InvalidGraph,
        failures.InvalidProtobuf,
        failures.NotImplemented,
        failures.RuntimeException,
    ) as error:
        raise EngineError(f"onnxruntime cannot load this model: {str(error).splitlines()[0]}") from None
    if session.get_providers()[0] != _PROVIDERS[device][0]:  # it only logs that it goes on without the one asked for
        raise EngineError("onnxruntime could not load its CUDA libraries; they must fit its version (see its log).")
    return session
