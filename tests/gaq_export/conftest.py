"""Made once for all tests of this room: a tiny model on disk, its calibrated run, its engine, and plans of other bits.

Tests read them; whoever changes a file works on a copy.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.config import ActivationConfig, OmegaConfig, QuantConfig, ReconstructionConfig, WeightConfig
from calib.data import NO_CONDITION, CalibrationSet
from calib.plan import QuantPlan
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.deploy import build, onnx_artifact
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.graph.export import export_float
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.quantize import latency
from tests.gaq_export.folders import write_latent_pipelines, write_text_pipeline


@pytest.fixture(scope="session")
def exported() -> Callable[..., ir.Model]:
    """Return what exports a network, each once: torch takes seconds for one, and many tests start from the same."""
    cached: dict[str, onnx.ModelProto] = {}

    def export(
        network: nn.Module, shape: tuple[int, int, int], condition: Mapping[str, Tensor] = NO_CONDITION
    ) -> ir.Model:
        if any(module._forward_pre_hooks for module in network.modules()):
            return export_float(network, shape, condition)  # rounds in its hooks, which a fingerprint of weights lacks
        key = f"{fingerprint(network)}{shape}{sorted(condition)}"
        if key not in cached:
            cached[key] = ir.to_proto(export_float(network, shape, condition))
        return ir.from_proto(cached[key])

    return export


@pytest.fixture(scope="session", autouse=True)
def _each_network_is_exported_once(exported: Callable[..., ir.Model]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (build, onnx_artifact, latency):
            patch.setattr(module, "export_float", exported)
        yield


@pytest.fixture(scope="session")
def home(make_tiny_unet, write_tiny_folder, tmp_path_factory) -> Path:
    """The tiny model as a diffusers folder."""
    return write_tiny_folder(make_tiny_unet(), tmp_path_factory.mktemp("home") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(home: Path) -> LoadedModel:
    return load_model(weights=home)


@pytest.fixture(scope="session")
def tiny_graph(tiny_model: LoadedModel, exported: Callable[..., ir.Model]) -> Callable[[], ir.Model]:
    """Return what gives a fresh copy of the tiny model's float graph."""
    return lambda: exported(tiny_model.network, tiny_model.shape)


@pytest.fixture(scope="session")
def tiny_run(tiny_model: LoadedModel, tmp_path_factory) -> Path:
    """A run folder with the plan of the tiny model, preset tiny, W4A8."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    pipeline.calibrate(tiny_model, pipeline.preset("tiny"), folder=folder)
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_run: Path, tiny_model: LoadedModel, tmp_path_factory) -> EngineFile:
    """An OpenVINO engine of that plan, for any sampler."""
    out = tmp_path_factory.mktemp("engine") / "unet.plan"
    config = EngineConfig(backend="openvino", threads=1)
    return pipeline.build_engine(folder=tiny_run, out=out, config=config, graph="eps", model=tiny_model).file


@pytest.fixture(scope="session")
def tiny_step_engine(tiny_run: Path, tiny_model: LoadedModel, tmp_path_factory) -> EngineFile:
    """An OpenVINO engine of that plan that holds five noisy DDIM steps."""
    out, spec = tmp_path_factory.mktemp("step-engine") / "unet.plan", SamplerSpec(steps=5, eta=0.5)
    config = EngineConfig(backend="openvino", threads=1)
    return pipeline.build_engine(folder=tiny_run, out=out, config=config, sampler=spec, model=tiny_model).file


@pytest.fixture(scope="session")
def noisy() -> Callable[[int], CalibrationSet]:
    """Return what makes eight seeded noisy one-channel images of a size, two at each of four timesteps."""

    def make(size: int) -> CalibrationSet:
        x = torch.randn(8, 1, size, size, generator=torch.Generator().manual_seed(1))
        step = torch.arange(4).repeat_interleave(2)
        return CalibrationSet(x=x, t=99 - 30 * step, step=step)

    return make


@pytest.fixture(scope="session")
def quick_plan(noisy: Callable[[int], CalibrationSet]) -> Callable[..., QuantPlan]:
    """Return what makes a plan in one iteration: its scales are real, its rounding nearly the nearest."""

    def make(
        network: nn.Module,
        size: int,
        wbits: int,
        abits: int,
        *,
        per_step: bool = False,
        symmetric: bool = True,  # plain grids, unless a test is about others
        convention: str = "deploy",
    ) -> QuantPlan:
        config = QuantConfig(
            weight=WeightConfig(bits=wbits),
            activation=ActivationConfig(bits=abits, batch=4, per_step=per_step, symmetric=symmetric),
            reconstruction=ReconstructionConfig(iterations=1, batch=2),
            omega=OmegaConfig(rule="uniform"),
            convention=convention,
            micro_batch=4,
        )
        return calibrate(network, noisy(size), config, timesteps=100)

    return make


@pytest.fixture(scope="session")
def tiny_plan(tiny_model: LoadedModel, quick_plan: Callable[..., QuantPlan]) -> Callable[..., QuantPlan]:
    """Return what makes a plan of the tiny model at given bits, kinds of grids and convention, once each."""

    @functools.cache
    def kept(wbits: int, abits: int, per_step: bool, symmetric: bool, convention: str) -> QuantPlan:
        form = {"per_step": per_step, "symmetric": symmetric, "convention": convention}
        return quick_plan(tiny_model.network, 16, wbits, abits, **form)

    def make(
        wbits: int, abits: int, *, per_step: bool = False, symmetric: bool = True, convention: str = "deploy"
    ) -> QuantPlan:
        return kept(wbits, abits, per_step, symmetric, convention)

    return make


@pytest.fixture(scope="session")
def latent_pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline folder with each kind of decoder, see `folders.write_latent_pipelines`."""
    return write_latent_pipelines(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Return what writes a pipeline folder of one text encoder, or of two, once each."""
    pytest.importorskip("transformers", reason="no transformers: pip install 'gaq-export[text]'")
    return functools.cache(lambda pair: write_text_pipeline(tmp_path_factory.mktemp("pipeline"), pair=pair))
