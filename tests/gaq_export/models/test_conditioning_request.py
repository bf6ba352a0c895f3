"""What the options ask to draw: read as they are meant, refused where the network does not take it."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from gaq_export.diffusion.conditioning import LABELS
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.conditioning_request import ConditioningRequest, condition_model, parse_classes, read_prompts
from gaq_export.models.loader import LoadedModel, load_model, random_model, wrap
from gaq_export.models.registry import MODELS, reduced
from tests.gaq_export.models.test_architectures import SMALL


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, write_tiny_folder) -> Path:
    """A folder with a U-Net of ten classes and an unconditional one."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return write_tiny_folder(UNet2DModel(**SMALL, **blocks, num_class_embeds=11), tmp_path_factory.mktemp("home") / "d")


def of(name: str) -> LoadedModel:
    return random_model(reduced(MODELS[name]))


def test_a_model_of_classes_gets_all_of_them_with_the_guidance_of_the_table(labelled: Path) -> None:
    for name, scale in (("imagenet-ldm", 3.0), ("dit-xl-2-256", 1.5)):
        conditioning = condition_model(of(name)).conditioning
        assert conditioning is not None
        assert (len(conditioning.names), conditioning.guidance, int(conditioning.unconditional[LABELS])) == (
            1000,
            scale,
            1000,
        )
    plain = condition_model(load_model(weights=labelled)).conditioning  # of which nobody knows what the last class is
    assert plain is not None
    assert (plain.names[-1], plain.guidance, plain.unconditional) == ("10", 1.0, {})
    model = condition_model(load_model(weights=labelled), ConditioningRequest(guidance=2.0))
    guided = model.conditioning
    assert guided is not None
    assert model.spec.sampler.name == "ddim-clipped"  # guidance makes epsilon large, and the schedule clips x0
    assert condition_model(load_model(weights=labelled)).spec.sampler.name == "ddim"
    assert condition_model(of("imagenet-ldm")).spec.sampler.name == "ddim"  # whose schedule clips nothing
    own = wrap(model.module, shape=model.shape, schedule=model.schedule, conditioning=guided)
    assert own.spec.sampler.name == "ddim-clipped"
    asked = wrap(model.module, shape=model.shape, schedule=model.schedule, conditioning=guided, sampler=SamplerSpec())
    assert asked.spec.sampler.name == "ddim"
    assert (guided.names[-1], guided.guidance, int(guided.unconditional[LABELS])) == ("9", 2.0, 10)


def test_a_condition_that_the_network_does_not_take_is_refused(
    labelled: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    assert condition_model(tiny_model) is tiny_model
    model, text = load_model(weights=labelled), of("sd15")
    for who, asked, words in (
        (
            tiny_model,
            ConditioningRequest(classes="1", guidance=2.0),
            "is unconditional: leave out --classes, --guidance",
        ),
        (model, ConditioningRequest(prompts=prompts), "takes classes, not prompts"),
        (
            model,
            ConditioningRequest(classes="0-11"),
            r"Found classes '0-11'; write all, or numbers of 0 to 10 and ranges of them",
        ),
        (model, ConditioningRequest(classes="3-1"), "Found classes '3-1'"),
        (model, ConditioningRequest(classes="some"), "Found classes 'some'"),
        (text, ConditioningRequest(classes="1"), "takes prompts, not classes"),
        (text, ConditioningRequest(), "draws from prompts: give --prompts FILE"),
        (text, ConditioningRequest(prompts=prompts), "has no text_encoder/ beside its network"),
    ):
        with pytest.raises(GaqError, match=words):
            condition_model(who, asked)
    with pytest.raises(GaqError, match="Found a guidance of nan"):
        ConditioningRequest(guidance=float("nan"))


def test_classes_are_numbers_and_ranges() -> None:
    assert parse_classes("all", 3) == [0, 1, 2]
    assert parse_classes("7, 0-2", 10) == [7, 0, 1, 2]


def test_prompts_are_the_lines_of_a_file_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  the dog, at night \n")
    assert read_prompts(file) == ["a cat", "the dog, at night"]
    file.write_text("\n")
    with pytest.raises(GaqError, match="holds no prompts: write one a line"):
        read_prompts(file)
    with pytest.raises(GaqError, match=r"Cannot read the prompts .*gone"):
        read_prompts(tmp_path / "gone")


@pytest.mark.parametrize(
    "text",
    ["1-2-3", "0-3-5", "9-0,1", "9-0", "0-99999999999", "0-" + "9" * 5000, "10", "-1", "0-", "-", "", ",", "1,,2", "a",
     "1.5", "0x1", "٣", "1;2", "0-9,10"],
)  # fmt: skip
def test_classes_that_mean_nothing_are_refused_before_they_are_written_out(text: str) -> None:
    with pytest.raises(GaqError, match=r"Found classes '.*'; write all, or numbers of 0 to 9 and ranges") as error:
        parse_classes(text, 10)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf \n", "holds no prompts"),
        (b"a cat\0\n", r"are no text: they hold the character '\\x00'"),
        (b"a \x1b[31mcat\n", r"are no text: they hold the character '\\x1b'"),
        (b"\x89PNG\r\n", r"are no text in UTF-8 \(byte 0\): save them as such"),
        ("a cat".encode("utf-16"), r"are no text in UTF-8 \(byte 0\)"),
        (b"a\n" * 100_001, "holds more than 100000 prompts or 16 MiB: give fewer"),
        (b"a" * ((1 << 24) + 1), "holds more than 100000 prompts or 16 MiB"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_files_that_are_no_prompts_are_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(GaqError, match=words) as error:
        read_prompts(tmp_path / "prompts.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_what_is_no_file_of_prompts_is_one_line(path: str) -> None:
    with pytest.raises(GaqError, match=r"Cannot read the prompts /: Is a directory|holds more than|no text"):
        read_prompts(Path(path))


def test_a_mark_in_front_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\ta dog\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
