"""A config whose sizes are no sizes, or beyond any network, is refused before anything is built of it."""

import json
from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.models.loader import load_model
from gaq_export.models.network_config import check_sizes

SIZE = "expected a whole number from 1 to 65536, or two of them"
WRONG: list[tuple[dict[str, object], str]] = [
    ({"_class_name": ["UNet2DModel"]}, r"_class_name is \['UNet2DModel'\], expected the name of a class"),
    ({"_class_name": {"a": 1}}, "_class_name is {'a': 1}, expected the name of a class"),
    *(({"sample_size": size}, SIZE) for size in ([1, 2, 3], 32.5, -32, 0, 10**9, "32", True, [16, 0], [16], 10**99)),
    ({"sample_size": 40_000}, r"shape \(1, 40000, 40000\) is larger than 1 GiB"),
    ({"layers_per_block": 10**6}, "layers_per_block is 1000000, expected a whole number from 1 to 512"),
    ({"layers_per_block": 400, "block_out_channels": [8] * 16}, "describes 6400 blocks .*; 4096 at most"),
    ({"block_out_channels": [10**9, 10**9]}, "block_out_channels is .* expected a whole number from 1 to 1048576"),
    ({"block_out_channels": [1 << 16] * 2}, r"describes \d+ parameters, but the weights beside it have \d+ bytes"),
    ({"block_out_channels": []}, r"block_out_channels is \[\], expected"),
    ({"in_channels": 0}, "in_channels is 0, expected a whole number from 1"),
    ({"down_block_types": "DownBlock2D"}, "down_block_types is 'DownBlock2D', expected a list of 1 to 16 names"),
    ({"down_block_types": [1, 2]}, r"down_block_types is \[1, 2\], expected a list of 1 to 16 names"),
    ({"num_class_embeds": 10**12}, "num_class_embeds is 1000000000000, expected"),
    ({"norm_eps": "x"}, "norm_eps is 'x', expected a number up to 1000000"),
    ({"mid_block_scale_factor": [1]}, r"mid_block_scale_factor is \[1\], expected a number"),
    ({"attention_head_dim": [8, 8]}, "diffusers cannot build the architecture"),
    ({"time_embedding_type": "other"}, "diffusers cannot build the architecture"),
    ({"sample_size": 17}, r"forward pass fails for x \(2, 1, 17, 17\).*takes images of 18 x 18.*sample_size in config"),
    ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "forward pass fails|cannot build the architecture|do not fit"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_config_of_wrong_sizes_is_refused_in_one_line(
    fields: dict[str, object], message: str, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(GaqError, match=message) as caught:
        load_model(weights=tiny_folder)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err  # torch logs what fails when shapes alone are computed


def test_a_config_nested_without_end_is_no_config(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(GaqError, match="cannot be read as JSON"):
        load_model(weights=tiny_folder)


@pytest.mark.parametrize(
    "fields", [{"vocab_size": -1}, {"num_hidden_layers": 10**7}, {"latent_channels": "4"}, {"scaling_factor": "x"}]
)
def test_configs_of_decoders_and_text_encoders_have_sizes_too(fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(GaqError, match=f"The config is not valid: {name} is .* expected a"):
        check_sizes(fields, "The config")
