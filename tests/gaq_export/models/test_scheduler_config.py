import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from gaq_export.diffusion.samplers import table
from gaq_export.diffusion.schedule import timesteps
from gaq_export.errors import GaqError
from gaq_export.models.scheduler_config import (
    read_scheduler,
    read_scheduler_config,
    schedule_from_scheduler_config,
)

DDIM = {"_class_name": "DDIMScheduler"}


def test_a_schedule_is_read_from_a_folder_a_file_and_a_mapping(tmp_path: Path) -> None:
    config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2"}
    config |= {"clip_sample": False, "variance_type": "fixed_large"}
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(config))
    schedules = [schedule_from_scheduler_config(source) for source in (tmp_path, file, config)]
    for schedule in schedules:
        assert torch.equal(schedule.alpha_bar, schedules[0].alpha_bar)
        assert (schedule.clip, schedule.variance, schedule.num_train) == (None, "fixed_large", 50)


def test_the_clipping_range_comes_from_the_config() -> None:
    assert schedule_from_scheduler_config(DDIM | {"clip_sample_range": 3.0}).clip == 3.0


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_model_that_does_not_predict_noise_is_refused(prediction: str) -> None:
    with pytest.raises(GaqError, match=f"prediction_type '{prediction}'"):
        schedule_from_scheduler_config(DDIM | {"prediction_type": prediction})


def test_scheduler_configs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="dynamic thresholding"):
        schedule_from_scheduler_config(DDIM | {"thresholding": True})
    with pytest.raises(GaqError, match="zigzag"):
        schedule_from_scheduler_config(DDIM | {"beta_schedule": "zigzag"})
    with pytest.raises(GaqError, match="rescale_betas_zero_snr"):
        schedule_from_scheduler_config(DDIM | {"rescale_betas_zero_snr": True})
    with pytest.raises(GaqError, match=r"no scheduler config .*nowhere"):
        read_scheduler_config(tmp_path / "nowhere")
    broken = tmp_path / "scheduler_config.json"
    broken.write_text("{")
    with pytest.raises(GaqError, match="cannot be read"):
        read_scheduler_config(tmp_path)
    broken.write_text("[]")
    with pytest.raises(GaqError, match="JSON object, not a list"):
        read_scheduler_config(tmp_path)


WRONG = {
    "clip_sample": ("yes", "clip_sample is 'yes', expected a valid boolean"),
    "clip_sample_range": ("x", "clip_sample_range is 'x', expected a valid number"),
    "variance_type": ("zz", "variance_type is 'zz', expected 'fixed_small', .* or 'learned_range'"),
    "num_train_timesteps": (-5, "num_train_timesteps is -5, expected greater than or equal to 1"),
    "num_train_timesteps ": (10**9, "num_train_timesteps is 1000000000, expected less than or equal to 100000"),
    "num_train_timesteps  ": (True, "num_train_timesteps is True, expected a valid integer"),
    "beta_start": (math.nan, "beta_start is nan, expected"),
    "beta_end": ("0.02", "beta_end is '0.02', expected a valid number"),
    "beta_end ": (7, "beta_end is 7, expected less than 1"),
    "beta_schedule": (["linear"], r"beta_schedule is \['linear'\], expected 'linear', .* or 'sigmoid'"),
    "beta_start ": (0.999, "alpha_bar must fall steadily and stay inside"),
    "trained_betas": ("x", "trained_betas is 'x', expected a valid array"),
    "trained_betas ": ([0.1, 2], "trained_betas.1 is 2, expected less than 1"),
    "trained_betas  ": ([0.1, 0.2], "trained_betas has 2 values for num_train_timesteps 1000"),
    "timestep_spacing": ("zz", "timestep_spacing is 'zz', expected 'leading', 'trailing' or 'linspace'"),
    "steps_offset": (-1, "steps_offset is -1, expected greater than or equal to 0"),
    "steps_offset ": (2000, "cannot take a single step over 1000 timesteps"),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_of_another_kind_or_out_of_range_is_named(field: str, tmp_path: Path) -> None:
    value, message = WRONG[field]
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDPMScheduler", field.strip(): value}))
    with pytest.raises(GaqError, match=message) as caught:
        read_scheduler(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_betas_may_be_an_array_in_memory(tmp_path: Path) -> None:
    betas = np.linspace(1e-4, 2e-2, 100, dtype=np.float32)
    saved = DDIMScheduler(num_train_timesteps=100, trained_betas=betas)
    saved.save_pretrained(tmp_path)
    schedules = [schedule_from_scheduler_config(source) for source in (saved.config, tmp_path)]
    for schedule in schedules:
        assert torch.allclose(schedule.alpha_bar, saved.alphas_cumprod.double(), rtol=1e-6)


def test_fields_that_a_class_does_not_take_do_not_matter() -> None:
    # diffusers ignores them too; saved by one scheduler, read by another.
    config = {"_class_name": "PNDMScheduler", "clip_sample": "yes", "skip_prk_steps": True, "made_by": {"a": [1]}}
    assert read_scheduler(config).schedule.clip is None


def test_what_a_config_leaves_out_is_as_its_class_has_it() -> None:
    heun, ddim = read_scheduler({"_class_name": "HeunDiscreteScheduler"}), read_scheduler(DDIM)
    assert heun.sampler.spacing == "linspace"
    assert heun.schedule.alpha_bar[0] == pytest.approx(1 - 0.00085)
    assert ddim.sampler.spacing == "uniform"
    assert ddim.schedule.alpha_bar[0] == pytest.approx(1 - 0.0001)
    assert (heun.schedule.clip, ddim.schedule.clip) == (None, 1.0)


def test_a_config_without_a_class_has_to_say_that_the_network_predicts_noise() -> None:
    assert read_scheduler({"prediction_type": "epsilon"}).sampler.name == "ddim"
    for config in ({}, {"num_train_timesteps": 1000, "beta_schedule": "linear"}):
        with pytest.raises(GaqError, match=r'no _class_name, .*"prediction_type": "epsilon"'):
            read_scheduler(config)


@pytest.mark.parametrize("num_train", [1, 2, 40, 50, 51, 1000])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_model_of_few_timesteps_is_drawn_in_as_many_steps_as_it_allows(
    num_train: int, name: str, spacing: str
) -> None:
    config = {"_class_name": name, "num_train_timesteps": num_train, "timestep_spacing": spacing, "steps_offset": 1}
    used = (spacing == "leading") + (name.startswith("DPM") and spacing != "trailing")  # by the offset, by timestep 0
    if num_train <= used:
        with pytest.raises(GaqError, match=f"cannot take a single step over {num_train} timesteps"):
            read_scheduler(config)
        return
    reading = read_scheduler(config)
    assert min(50, num_train - 2) <= reading.sampler.steps <= min(50, num_train)
    assert len(table(reading.schedule, reading.sampler)) == reading.sampler.steps


@pytest.mark.parametrize("num_train", [60, 75, 99, 100, 1000])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("offset", [0, 1])
def test_by_default_the_first_step_is_among_the_noisiest_timesteps(num_train: int, name: str, offset: int) -> None:
    # 50 strides of one timestep would begin in the middle of the schedule, and pure noise does not belong there.
    config = {"_class_name": name, "num_train_timesteps": num_train, "steps_offset": offset}
    sampler = read_scheduler(config | {"timestep_spacing": "leading"}).sampler
    assert timesteps(sampler, num_train)[0] >= 0.9 * (num_train - 1)
    assert sampler.steps >= 24
    assert sampler.steps == 50 or num_train < 1000
