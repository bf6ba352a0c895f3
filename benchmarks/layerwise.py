"""In which layer does a runtime differ from ONNX Runtime? Every weight layer's output side by side, by Polygraphy.

Marking outputs changes what a builder fuses, so this finds a layer that is wrong; it does not time anything.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator

from calib.sqnr import sqnr_db
from engines.graph import read_onnx, weight_layers

Feeds = Mapping[str, npt.NDArray[Any]]
MakeRunner = Callable[[bytes, Feeds], Any]  # a Polygraphy runner of an ONNX file for inputs of these shapes


def compare_layers(graph: Path, feeds: Feeds, make: MakeRunner) -> dict[str, float]:
    """Return the SQNR in dB of each weight layer's output, against ONNX Runtime without optimisations on the CPU.

    Args:
        graph: float32 QDQ graph, so that ONNX Runtime computes it as it is written.
        feeds: its inputs.
        make: makes the runner to compare.
    """
    model = onnx.shape_inference.infer_shapes(read_onnx(graph).model)
    names = [node.output[0] for node in weight_layers(model).values()]
    marked = BytesFromOnnx(ModifyOutputs(model, outputs=[*names, *(value.name for value in model.graph.output)]))()
    runs = Comparator.run([onnxruntime_runner(marked), make(marked, feeds)], data_loader=[dict(feeds)])
    expected, computed = (run[0] for _, run in runs)
    both = {name: [torch.from_numpy(np.asarray(part[name])) for part in (expected, computed)] for name in names}
    return {name: sqnr_db(exact, other) for name, (exact, other) in both.items()}


def onnxruntime_runner(graph: bytes, level: str = "ORT_DISABLE_ALL") -> Any:
    """Make an ONNX Runtime runner on the CPU; `level` is a member of its GraphOptimizationLevel."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return OnnxrtRunner(onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))


def tensorrt_runner(graph: bytes, feeds: Feeds) -> Any:
    """Make a TensorRT runner, or one of TensorRT-RTX where POLYGRAPHY_USE_TENSORRT_RTX is set; needs a GPU."""
    from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxBytes, Profile, TrtRunner

    profile = Profile()
    for name, array in feeds.items():
        profile.add(name, array.shape, array.shape, array.shape)
    network = NetworkFromOnnxBytes(graph, strongly_typed=True)
    return TrtRunner(EngineFromNetwork(network, CreateConfig(profiles=[profile])))
