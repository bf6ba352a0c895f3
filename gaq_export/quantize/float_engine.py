"""Who draws the calibration set: the float network in PyTorch, or an engine of it where that is much faster.

On a CPU with matrix units for bfloat16 (AMX) OpenVINO runs a large U-Net three times as fast in that type as PyTorch
does in float32. Trajectories are only samples of what the network sees; what a block has to reproduce is computed from
them in float32 afterwards.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import engines
from calib.cost import layer_macs
from engines import Compute, EngineConfig
from engines.machine import cpu_features
from gaq_export.devices import ON_HOST
from gaq_export.diffusion.conditioning import ConditionalNetwork
from gaq_export.diffusion.denoiser import engine_denoiser
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.openvino import rewrite_for_openvino
from gaq_export.models.loader import LoadedModel

GROUP = 4  # images that PyTorch draws at a time on a CPU
ENGINE_GROUP = 16
GPU_GROUP = 64  # at most
GPU_WORK = 1.6e12  # multiplications of a call that a GPU is busy with, and has the memory for
BACKEND = "openvino"
FEATURE = "amx_bf16"
LARGE = 1e11  # multiplications of a trajectory from which on an engine saves more than its export costs


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """Who draws trajectories.

    Attributes:
        name: part of what trajectories depend on; empty for PyTorch on the host.
        group: images at a time; trajectories depend on it in their last bits.
        open: makes the network that draws, called as (x, t) or (x, t, cond).
    """

    name: str
    group: int
    open: Callable[[LoadedModel], AbstractContextManager[ConditionalNetwork]]


def drawers(model: LoadedModel, spec: SamplerSpec, *, by_engine: bool = True) -> list[Drawer]:
    """Return who may draw a float model's trajectories, the fastest first; the last one always can."""
    if model.device.kind != ON_HOST.kind:
        return [Drawer(name=model.device.kind, group=network_group(model), open=_network)]
    plain = Drawer(name="", group=GROUP, open=_network)
    if not by_engine or FEATURE not in (cpu_features() or ()) or engines.find_backend(BACKEND).can_run():
        return [plain]
    if spec.steps * _multiplications(model) < LARGE:
        return [plain]
    return [Drawer(name=f"{BACKEND}, {Compute.BFLOAT16}", group=ENGINE_GROUP, open=_engine), plain]


def network_group(model: LoadedModel) -> int:
    """Return how many images PyTorch draws at a time on the model's device."""
    if model.device.kind == ON_HOST.kind:
        return GROUP
    return max(1, min(GPU_GROUP, int(GPU_WORK / _multiplications(model))))


def _multiplications(model: LoadedModel) -> int:
    """Return how many one sample takes in one call of the network."""
    return sum(layer_macs(model.network, model.shape, model.schedule.num_train, model.condition_inputs).values())


@contextmanager
def _network(model: LoadedModel) -> Iterator[ConditionalNetwork]:
    yield model.network


@contextmanager
def _engine(model: LoadedModel) -> Iterator[ConditionalNetwork]:
    """Build and open the engine of the float network, in a folder that goes afterwards."""
    batch = 2 * ENGINE_GROUP if model.guided else ENGINE_GROUP
    config = EngineConfig(backend=BACKEND, batch=(batch, batch, batch), compute=Compute.BFLOAT16)
    graph = export_float(model.network, model.shape, model.condition_inputs)
    rewrite_for_openvino(graph)
    with tempfile.TemporaryDirectory() as scratch:
        save_onnx(graph, Path(scratch, "unet.onnx"))
        file = engines.build(Path(scratch, "unet.onnx"), Path(scratch, "unet.plan"), config)
        with engines.open_engine(file) as opened:
            yield engine_denoiser(opened)
