"""No file that a user was given runs code when it is read: a pickle that would write a file never writes it.

Every way by which a foreign file comes in is one row below. What is refused is refused in one line.
"""

import importlib.util
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import engines
from calib.errors import CalibError
from calib.plan import load_plan
from engines import EngineError, EngineFile
from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_metrics, frechet
from gaq_export.evaluation.feature_extractors import find_extractor
from gaq_export.evaluation.image_sets import open_images
from gaq_export.models import diffusers_folder, text_encoder
from gaq_export.models.latent_decoder import find_decoder
from gaq_export.models.loader import load_model
from gaq_export.models.weight_files import DIFFUSERS, SAFETENSORS
from gaq_export.sampling import shards
from tests.records import edit_engine_record

NOT_READ = (
    r"The weights \S+ (hold more than tensors \(\S+\), which could run code, so they were not read\. Save the "
    r"state_dict alone, best as \.safetensors|are damaged \(not a table of tensors\)\. Fetch them again)\.$"
)
Write = Callable[[Path], Path]


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    """What writes a file when it is unpickled; that the file is not there in the end is every test's last line."""
    made = Hostile(tmp_path / "code-was-run")
    yield made
    assert not made.marker.exists()
    pickle.loads(pickle.dumps(made))  # noqa: S301 - our own
    assert made.marker.exists(), "the pickle of these tests is harmless"


@pytest.fixture(params=["zip", "old", "bare"])
def write(request: pytest.FixtureRequest, hostile: Hostile) -> Write:
    """Return what writes a hostile pickle as torch does, as old versions of torch did, or as Python does."""

    def make(path: Path) -> Path:
        content = {"conv_in.bias": torch.zeros(2), "state_dict": hostile}
        if request.param == "bare":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return make


def refused(words: str, read: Callable[[], object]) -> None:
    with pytest.raises((GaqError, CalibError, EngineError), match=words) as error:
        read()
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value), "torch's advice is to run the code"


@pytest.mark.parametrize("name", ["inception", "inception-clean", "resnet56"])
def test_weights_of_features_are_read_as_tensors(name: str, write: Write, tmp_path: Path) -> None:
    if name != "resnet56" and importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    file = write(tmp_path / "features.pth")
    refused(NOT_READ, lambda: find_extractor(f"{name}={file}"))


def test_weights_that_were_downloaded_are_read_as_tensors(write: Write, tmp_path: Path, monkeypatch) -> None:
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    url = feature_metrics.library("feature_extractor_inceptionv3").URL_INCEPTION_V3
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints" / url.rpartition("/")[2])
    refused(NOT_READ, lambda: find_extractor("inception"))


def test_a_model_folder_with_a_pickle_is_refused_and_one_of_the_hub_is_read_as_tensors(
    tiny_folder: Path, write: Write
) -> None:
    (tiny_folder / SAFETENSORS).unlink()
    write(tiny_folder / DIFFUSERS.pickle)
    refused("are a pickle", lambda: load_model(weights=tiny_folder))
    refused(NOT_READ, lambda: diffusers_folder.load_network(tiny_folder, allow_pickle=True))


@pytest.mark.parametrize("place", ["vae", "vqvae"])
def test_a_decoders_pickle_is_read_as_tensors(
    place: str, latent_pipelines: dict[str, Path], write: Write, tmp_path: Path
) -> None:
    folder = shutil.copytree(latent_pipelines[place], tmp_path / "pipeline")
    (folder / place / SAFETENSORS).unlink()
    write(folder / place / DIFFUSERS.pickle)
    refused("are a pickle", lambda: load_model(weights=folder))
    refused(NOT_READ, lambda: find_decoder(folder, 3, allow_pickle=True))


def test_a_text_encoders_pickle_is_read_as_tensors(
    text_pipeline: Callable[[bool], Path], write: Write, tmp_path: Path
) -> None:
    folder = shutil.copytree(text_pipeline(False), tmp_path / "pipeline")
    (folder / "text_encoder" / "model.safetensors").unlink()
    write(folder / "text_encoder" / "pytorch_model.bin")
    refused("are a pickle", lambda: text_encoder.load(folder))
    refused(NOT_READ, lambda: text_encoder.load(folder, allow_pickle=True))


def test_an_original_checkpoint_is_read_as_tensors(write: Write, tmp_path: Path) -> None:
    file = write(tmp_path / "model.ckpt")
    refused(NOT_READ, lambda: load_model("ddpm-mnist", file))


def test_a_checkpoint_that_names_the_trainers_classes_runs_none_of_their_code(tmp_path: Path, hostile: Hostile) -> None:
    # A module of that name in the working directory would be imported by Python's own unpickler.
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text(f"import pathlib\npathlib.Path({str(hostile.marker)!r}).touch()\n")
    content = b"\x80\x02}X\x05\x00\x00\x00modelcpytorch_lightning\nTrainer\n)R" + b"s."
    (tmp_path / "model.ckpt").write_bytes(content)
    refused("The weights .*model.ckpt (are damaged|hold more than tensors)", lambda: load_model("ddpm-mnist", tmp_path))


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("is not a whole safetensors file", lambda path: find_extractor(f"digits={path}")),
        ("is not a whole safetensors file", lambda path: find_extractor(f"resnet56={path}")),
        ("are damaged", lambda path: diffusers_folder.load_network(path.parent)),
    ],
)
def test_a_pickle_under_another_name_is_not_read(
    words: str, read: Callable[[Path], object], tiny_folder: Path, write: Write
) -> None:
    refused(words, lambda: read(write(tiny_folder / SAFETENSORS)))


def test_pickles_in_place_of_our_own_files_are_not_read(write: Write, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    write(run / "plan.safetensors")
    refused("plan", lambda: load_plan(run / "plan.safetensors"))
    order = shards.Order(num=1, seed=0, shard=1, batch=1, identity={})
    shards.claim(tmp_path / "drawn", order)
    write(shards.shard_path(tmp_path / "drawn", 0))
    refused("is not a whole safetensors file", lambda: open_images(tmp_path / "drawn"))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_pickle_in_place_of_an_engine_is_not_read(
    backend: str, tiny_engine: EngineFile, write: Write, tmp_path: Path
) -> None:
    engine = write(tmp_path / "unet.plan")
    shutil.copy(f"{tiny_engine.path}.json", f"{engine}.json")
    # Whoever sends an engine also sends the record with its checksums.
    changes = {"backend": backend, "sha256": engines.sha256_of(engine)}
    edit_engine_record(engine, lambda record: record.update(changes))
    refused("cannot", lambda: engines.open_engine(engine))


@pytest.mark.parametrize(
    "read",
    [open_images, lambda path: frechet.load_images(path, "train", (1, 8, 8))],
    ids=["images to evaluate", "images to train on"],
)
def test_arrays_of_objects_are_not_read(read: Callable[[Path], object], hostile: Hostile, tmp_path: Path) -> None:
    objects = np.array([hostile], dtype=object)
    np.savez(tmp_path / "x.npz", train_images=objects, train_labels=objects, allow_pickle=True)
    refused("cannot be read as an .npz", lambda: read(tmp_path / "x.npz"))
    (tmp_path / "y.npz").write_bytes(pickle.dumps(objects))
    refused("cannot be read as an .npz", lambda: read(tmp_path / "y.npz"))


def test_code_beside_a_model_is_never_imported(
    text_pipeline: Callable[[bool], Path], tmp_path: Path, hostile: Hostile
) -> None:
    folder = shutil.copytree(text_pipeline(False), tmp_path / "pipeline")
    code = f"import pathlib\npathlib.Path({str(hostile.marker)!r}).touch()\nclass Net: pass\n"
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "CLIPTokenizerFast")
    further = {"auto_map": dict.fromkeys(names, "modeling.Net"), "custom_pipeline": "modeling"}
    for place in (".", "unet", "vae", "scheduler", "tokenizer", "text_encoder"):
        (folder / place / "modeling.py").write_text(code)
        for file in (folder / place).glob("*config.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | further))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["modeling", "Net"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_model(weights=folder).shape == (4, 8, 8)
    assert text_encoder.encode(folder, ["a"])
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["modeling", "Net"]}))
    refused("would be left out", lambda: load_model(weights=folder))
    (folder / "model_index.json").unlink()
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": ["modeling", "Net"]}))
    refused("config", lambda: load_model(weights=folder))
