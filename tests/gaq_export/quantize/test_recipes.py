"""Every form of plan that recipes make becomes an engine: what PyTorch computes on OpenVINO, all INT8 on TensorRT-RTX.

Recipes whose plans differ in their numbers alone, not in what a graph has to hold, are tried once.
"""

import importlib.util
from pathlib import Path

import pytest

from calib.config import QuantConfig
from calib.plan import load_plan
from engines import EngineConfig, EngineFile
from gaq_export import pipeline
from gaq_export.deploy.build import Built
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.quantize.recipes import RECIPES, find_recipe


def form(name: str) -> tuple[object, ...]:
    """Return what of a recipe decides the form of its plan."""
    c = find_recipe(name).apply(QuantConfig())
    return c.convention, c.surgery, c.activation.per_step, c.activation.symmetric, c.correction.rule, c.activation.sizes


FORMS = {form(name): name for name in RECIPES}


@pytest.fixture(scope="module", params=FORMS.values())
def folder(request, tiny_model: LoadedModel, tmp_path_factory) -> Path:
    """The run folder of one recipe."""
    made: Path = tmp_path_factory.mktemp(request.param)
    chosen, sampler = pipeline.preset("tiny", CalibrationOptions(recipe=request.param)), SamplerSpec(steps=4)
    pipeline.calibrate(tiny_model, chosen, folder=made, sampler=sampler)
    return made


def build(folder: Path, model: LoadedModel, config: EngineConfig) -> Built:
    return pipeline.build_engine(folder=folder, out=folder / f"{config.backend}.plan", config=config, model=model)


def quantized(folder: Path, file: EngineFile) -> int:
    """Return how many layers are quantized and no tables in the engine."""
    return len(load_plan(folder / "plan.safetensors").layers.keys() - set(record_of(file).tables))


def test_on_openvino_it_computes_what_pytorch_does(folder: Path, tiny_model: LoadedModel) -> None:
    built = build(folder, tiny_model, EngineConfig(backend="openvino"))
    assert built.parity is not None
    assert built.parity.passed


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install tensorrt-rtx"
)
def test_on_tensorrt_rtx_every_layer_multiplies_int8_by_int8(folder: Path, tiny_model: LoadedModel) -> None:
    file = build(folder, tiny_model, EngineConfig(backend="tensorrt-rtx", targets=("sm89",))).file
    counts = file.audit.counts
    assert sum(n for (_, precision), n in counts.items() if precision == "int8") == quantized(folder, file) > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_settings_and_options_take_precedence(name: str) -> None:
    plain, chosen = pipeline.preset("tiny").config, pipeline.preset("tiny", CalibrationOptions(recipe=name)).config
    assert chosen != plain
    assert chosen == find_recipe(name).apply(plain)
    assert pipeline.preset("tiny", CalibrationOptions(recipe=name, omega="mse")).config.omega.rule == "mse"
    assert pipeline.preset("tiny", CalibrationOptions(recipe=name, correction="tac")).config.correction.rule == "tac"


def test_an_unknown_recipe_is_an_error() -> None:
    with pytest.raises(GaqError, match=r"Unknown recipe 'tfqm'. Did you mean 'tfmq'\? Choose one of \['rtn'.*\]"):
        pipeline.preset("tiny", CalibrationOptions(recipe="tfqm"))
