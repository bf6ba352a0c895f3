"""Networks that make features of images: what comes out, and what is said if one cannot be had."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gaq_export.errors import GaqError
from gaq_export.evaluation import feature_extractors, feature_metrics, frechet
from gaq_export.evaluation.feature_extractors import find_extractor


def pictures(channels: int, count: int = 60, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def test_the_digit_network_comes_with_the_package_and_is_the_same_in_any_batch() -> None:
    digits = find_extractor("digits")
    images = pictures(1)
    found = digits(images)
    assert (found.pooled.shape, found.logits.shape, found.spatial.shape) == ((60, 64), (60, 10), (60, 7 * 4 * 4))
    net = frechet.digit_net(feature_extractors.DIGITS, Path("nothing"), (1, 32, 32))
    assert torch.allclose(found.pooled, frechet.features(net, images), atol=1e-5)
    assert torch.allclose(found.logits, net(frechet.pixels(images)), atol=1e-4)
    one = digits(images[57:58])
    assert torch.allclose(one.spatial, found.spatial[57:58], atol=1e-5)
    assert len(digits.sha256) == 64
    assert digits.distance == "Frechet distance (digits)"
    with pytest.raises(GaqError, match="'digits' takes images of 1 channels; these have 3"):
        digits(pictures(3))


def test_a_resnet_takes_images_of_three_channels_and_repeats_one(tmp_path: Path) -> None:
    net = frechet.ResNet56()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "resnet56.th")
    found = find_extractor(f"resnet56={tmp_path / 'resnet56.th'}")
    assert found(pictures(3, 4)).spatial.shape == (4, 7 * 8 * 8)
    grey = pictures(1, 4)
    assert torch.equal(found(grey).pooled, found(grey.repeat(1, 3, 1, 1)).pooled)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of the true architecture."""
    pytest.importorskip("scipy")
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    module = feature_metrics.library("feature_extractor_inceptionv3")
    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        net = module.FeatureExtractorInceptionV3(
            "x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth")
        )
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_is_torch_fidelitys_and_its_spatial_features_are_those_of_sfid(inception: Path) -> None:
    found, images = find_extractor(f"inception={inception}"), pictures(3, 3)
    features = found(images)
    assert (features.pooled.shape, features.logits.shape) == ((3, 2048), (3, 1008))
    assert features.spatial.shape == (3, 2023)  # 7 channels of 17 x 17, as in ADM's evaluations
    module = feature_metrics.library("feature_extractor_inceptionv3")
    plain = module.FeatureExtractorInceptionV3("y", ["2048"], feature_extractor_weights_path=str(inception))
    with torch.no_grad():
        assert torch.allclose(plain(images)[0], features.pooled, atol=1e-5)
    assert found.distance == "FID"


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="clean-fid is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clean_resizing_is_pillows_with_antialiasing(inception: Path) -> None:
    clean, usual = find_extractor(f"inception-clean={inception}"), find_extractor(f"inception={inception}")
    smooth = torch.from_numpy(np.linspace(0, 255, 48 * 48).reshape(1, 1, 48, 48).astype(np.uint8)).expand(2, 3, -1, -1)
    resized = feature_extractors._resized_clean(smooth)
    assert resized.shape == (2, 3, 299, 299)
    assert int(resized[0, 0, 0, 0]) < 5
    assert int(resized[0, 0, -1, -1]) > 250
    assert torch.allclose(usual(resized).pooled, clean(smooth).pooled, atol=1e-4)
    assert clean.sha256 == usual.sha256
    assert clean.distance == "FID (clean resizing)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vgg", r"Unknown features 'vgg'. Choose one of \['digits', 'resnet56', 'inception', 'inception-clean'\]"),
        ("resnet56", r"There is no ResNet-56 in the package: give its file, as resnet56=PATH"),
        ("digits=/nowhere/x", r"/nowhere/x is not there; examples/train_digits\.py makes such a file"),
    ],
)
def test_features_that_cannot_be_had_are_one_line(text: str, words: str) -> None:
    with pytest.raises(GaqError, match=words):
        find_extractor(text)


def test_other_networks_weights_are_one_line(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "x.pth")
    save_file({"fc.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    for name, words in (
        ("inception=x.pth", "x.pth is not the Inception of torch-fidelity: Error"),
        ("resnet56=x.pth", "x.pth is not a ResNet-56 of akamaster/pytorch_resnet_cifar10: Error"),
        ("digits=x.safetensors", "x.safetensors is not a classifier of examples/train_digits.py: Error"),
        ("inception=y.pth", "y.pth is not there"),
    ):
        with pytest.raises(GaqError, match=words) as error:
            find_extractor(name.replace("=", f"={tmp_path}/"))
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(
        feature_metrics.library("feature_extractor_inceptionv3"), "URL_INCEPTION_V3", "http://127.0.0.1:9/w-0.pth"
    )
    with pytest.raises(
        GaqError, match=r"cannot be fetched \(.*Connection refused.*\): give their file, as inception=PATH"
    ):
        find_extractor("inception")


def test_weights_may_be_safetensors(inception: Path) -> None:
    save_file(torch.load(inception, weights_only=True), inception.with_suffix(".safetensors"))
    assert (
        find_extractor(f"inception={inception.with_suffix('.safetensors')}").sha256
        == find_extractor(f"inception={inception}").sha256
    )
