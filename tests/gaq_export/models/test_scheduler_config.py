import json
from pathlib import Path

import pytest
import torch

from gaq_export.errors import GaqError
from gaq_export.models.scheduler_config import read_scheduler_config, schedule_from_scheduler_config


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
    assert schedule_from_scheduler_config({"clip_sample": True, "clip_sample_range": 3.0}).clip == 3.0


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_a_model_that_does_not_predict_noise_is_refused(prediction: str) -> None:
    with pytest.raises(GaqError, match=f"prediction_type '{prediction}'"):
        schedule_from_scheduler_config({"prediction_type": prediction})


def test_scheduler_configs_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="dynamic thresholding"):
        schedule_from_scheduler_config({"thresholding": True})
    with pytest.raises(GaqError, match="zigzag"):
        schedule_from_scheduler_config({"beta_schedule": "zigzag"})
    with pytest.raises(GaqError, match="rescale_betas_zero_snr"):
        schedule_from_scheduler_config({"rescale_betas_zero_snr": True})
    with pytest.raises(GaqError, match=r"no scheduler config .*nowhere"):
        read_scheduler_config(tmp_path / "nowhere")
    broken = tmp_path / "scheduler_config.json"
    broken.write_text("{")
    with pytest.raises(GaqError, match="cannot be read"):
        read_scheduler_config(tmp_path)
    broken.write_text("[]")
    with pytest.raises(GaqError, match="JSON object, not a list"):
        read_scheduler_config(tmp_path)
