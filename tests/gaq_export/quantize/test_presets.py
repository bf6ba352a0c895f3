from dataclasses import replace

import pytest

from calib.config import QuantConfig
from calib.errors import CalibError
from gaq_export.errors import GaqError
from gaq_export.models.registry import MODELS
from gaq_export.quantize.presets import PRESETS, CalibrationOptions, parse_widths, preset, with_images
from gaq_export.quantize.recipes import RECIPES


@pytest.mark.parametrize("name", PRESETS)
def test_without_options_a_preset_is_its_row_of_the_table(name: str) -> None:
    assert preset(name) == PRESETS[name]


def test_the_published_preset_is_the_default_of_every_setting() -> None:
    assert preset("paper").config == QuantConfig()


def test_an_option_comes_before_the_recipe_and_the_recipe_before_the_preset() -> None:
    assert preset("fast").config.activation.per_step is False
    assert preset("fast", CalibrationOptions(recipe="tfmq")).config.activation.per_step is True
    assert preset("fast", CalibrationOptions(recipe="tfmq", per_step=False)).config.activation.per_step is False


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_changes_what_only_the_user_sets(recipe: str) -> None:
    options = CalibrationOptions(recipe=recipe, wbits=3, abits=6, keep_float=("*.conv1",), iterations=7, seed=5)
    config = preset("tiny", options).config
    assert (config.weight.bits, config.activation.bits, config.activation.narrower) == (3, 6, ())
    assert (config.keep_float, config.reconstruction.iterations, config.seed) == (("*.conv1",), 7, 5)


def test_of_several_activation_widths_the_widest_is_the_layers_and_steps_may_take_the_others() -> None:
    activation = preset("tiny", CalibrationOptions(abits=(4, 8, 6, 8))).config.activation
    assert (activation.bits, activation.narrower) == (8, (6, 4))


@pytest.mark.parametrize(
    ("text", "budget", "unit"),
    [("5bits", 5.0, "bits"), ("2.5 mb", 2.5, "MB"), ("300GBIT-OPS", 300.0, "Gbit-ops"), (" 12ms ", 12.0, "ms")],
)
def test_a_budget_is_a_number_and_a_unit_in_any_case(text: str, budget: float, unit: str) -> None:
    mixed = preset("tiny", CalibrationOptions(budget=text)).config.mixed
    assert (mixed.budget, mixed.unit) == (budget, unit)
    assert replace(mixed, budget=0.0, unit="bits") == PRESETS["tiny"].config.mixed


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "bits",
        "0bits",
        "1.2.3MB",
        "5 parsecs",
        "-1ms",
        "",
        ".bits",
        "1e400bits",
        pytest.param("9" * 400 + "bits", id="400 digits"),
    ],
)
def test_a_budget_that_cannot_be_read_is_answered_with_examples(text: str) -> None:
    with pytest.raises(GaqError, match=f"Found a budget of {text!r}; write it as 5bits, 2.5MB, 300Gbit-ops or 12ms"):
        preset("tiny", CalibrationOptions(budget=text))


@pytest.mark.parametrize("requested", [0, -1])
def test_no_trajectories_are_refused(requested: int) -> None:
    with pytest.raises(GaqError, match=f"Found {requested} trajectories to collect; ask for 1 or more"):
        with_images(PRESETS["tiny"], requested, 4)


def test_an_unknown_name_is_answered_with_the_nearest_and_the_table() -> None:
    with pytest.raises(GaqError, match=r"Unknown preset 'papers'. Did you mean 'paper'\? Choose one of \['tiny', "):
        preset("papers")
    with pytest.raises(CalibError, match="weight bits = 9: choose a whole number from 2 to 8"):
        preset("tiny", CalibrationOptions(wbits=9))


def test_activation_widths_are_one_number_or_several() -> None:
    assert (parse_widths("8"), parse_widths("4,8")) == ((8,), (4, 8))
    with pytest.raises(GaqError, match="Found activation bits 'eight'; write them as 8, or as 4,8"):
        parse_widths("eight")


def test_the_published_preset_takes_as_many_images_as_the_models_papers_do() -> None:
    paper, fast = preset("paper"), preset("fast")
    published = MODELS["sd15"].images
    assert published == 200 != paper.images
    images = [with_images(chosen, requested, published).images for chosen in (paper, fast) for requested in (None, 8)]
    assert images == [200, 8, fast.images, 8]
