"""Networks that make features of images, by which sets are compared. Only with Inception's is the distance an FID.

digits             a small classifier of digits, in the package; its features are 64 wide
resnet56=PATH      a ResNet-56 of akamaster/pytorch_resnet_cifar10, for images like CIFAR-10's
inception[=PATH]   the network of FID (torch-fidelity's port); downloaded unless there is a path
inception-clean    the same, images resized as clean-fid does it (Parmar et al. 2022, arXiv 2104.11222)
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import engines
from gaq_export.errors import GaqError, one_line
from gaq_export.evaluation import feature_metrics, foreign_weights, frechet
from gaq_export.evaluation.feature_metrics import Features
from gaq_export.evaluation.frechet import Classifier

DIGITS = Path(__file__).parent / "weights" / "digits" / "digits.safetensors"
BATCH = 50
SPATIAL_CHANNELS = 7  # of a convolution, as sFID takes them


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that makes features of images.

    Attributes:
        name: a key of EXTRACTORS.
        distance: name of a Frechet distance of its features.
        sha256: of its weights.
        channels: of its images; one-channel images are repeated for a network of three.
        size: height and width of its images, None if it takes any.
        run: makes features of (N, C, H, W) uint8.
    """

    name: str
    distance: str
    sha256: str
    channels: int
    size: int | None
    run: Callable[[Tensor], Features]

    def __call__(self, images: Tensor) -> Features:
        """Return the features of images (N, C, H, W) uint8; raise GaqError if they have other channels or sizes."""
        # (N, 1, H, W) -> (N, 3, H, W); a grey image looks the same to a network that takes colours.
        if images.shape[1] == 1 and self.channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.channels:
            raise GaqError(f"{self.name!r} takes images of {self.channels} channels; these have {images.shape[1]}.")
        if self.size is not None and images.shape[2:] != (self.size, self.size):
            raise GaqError(f"{self.name!r} takes images of {self.size}x{self.size}; these are {images.shape[2:]}.")
        with torch.no_grad():
            parts = [self.run(part) for part in torch.split(images, BATCH)]
        return Features(
            pooled=torch.cat([part.pooled for part in parts]),
            logits=torch.cat([part.logits for part in parts]),
            spatial=torch.cat([part.spatial for part in parts]),
        )


def find_extractor(text: str) -> Extractor:
    """Return the network that "name" or "name=PATH" means.

    Raises:
        GaqError: the name is unknown, the network needs a path, or its weights cannot be loaded.
    """
    name, _, path = text.partition("=")
    if name not in EXTRACTORS:
        raise GaqError(f"Unknown features {name!r}. Choose one of {list(EXTRACTORS)}.")
    return EXTRACTORS[name](name, Path(path).expanduser() if path else None)


def _digits(name: str, path: Path | None) -> Extractor:
    path = path or DIGITS
    if not path.is_file():
        raise GaqError(f"{path} is not there; examples/train_digits.py makes such a file.")
    net = frechet.digit_net(path, path, (1, 32, 32))
    return Extractor(
        name=name,
        distance="Frechet distance (digits)",
        sha256=engines.sha256_of(path),
        channels=1,
        size=32,  # its hidden layer takes the 4x4 that three strides of 2 leave
        run=_run_of_classifier(net, net.convolutions),
    )


def _resnet56(name: str, path: Path | None) -> Extractor:
    if path is None:
        raise GaqError("There is no ResNet-56 in the package: give its file, as resnet56=PATH.")
    net = frechet.resnet56(path)
    return Extractor(
        name=name,
        distance="Frechet distance (ResNet-56)",
        sha256=engines.sha256_of(path),
        channels=3,
        size=None,  # it ends in a mean over places
        run=_run_of_classifier(net, net.layer3),
    )


def _run_of_classifier(net: Classifier, last: nn.Module) -> Callable[[Tensor], Features]:
    """Return what makes a classifier's features.

    Args:
        net: the classifier.
        last: its last module whose output has a height and a width.
    """
    spatial = _record_spatial(last)

    def run(images: Tensor) -> Features:
        spatial.clear()
        pooled = net.features(frechet.pixels(images))
        return Features(pooled=pooled, logits=net.linear(pooled), spatial=spatial[0])

    return run


def _record_spatial(module: nn.Module) -> list[Tensor]:
    """Return a list to which each forward pass appends the module's spatial features, (N, SPATIAL_CHANNELS * h * w).

    A list, because a hook runs inside the forward pass and cannot return anything to its caller.
    """
    spatial: list[Tensor] = []
    # (N, C, h, w) -> (N, SPATIAL_CHANNELS * h * w)
    module.register_forward_hook(lambda _, args, out: spatial.append(out[:, :SPATIAL_CHANNELS].flatten(1)))
    return spatial


def _inception(name: str, path: Path | None) -> Extractor:
    """Load torch-fidelity's Inception; sFID's features are the first channels of a convolution of its mixed_6."""
    module = feature_metrics.library("feature_extractor_inceptionv3")
    weights = foreign_weights.read_state(_download(module.URL_INCEPTION_V3, name) if path is None else path)
    try:
        # 2048 is the pooled layer of FID; the Inception score takes the logits without the last layer's bias.
        net = module.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            # Never the user's file, because torch-fidelity would run what a pickle says.
            feature_extractor_weights_path=foreign_weights.as_file(weights),
        )
    except RuntimeError as error:
        raise GaqError(f"{path or name} is not the Inception of torch-fidelity: {one_line(error)}") from error
    spatial = _record_spatial(net.Mixed_6d.branch1x1.conv)

    def run(images: Tensor) -> Features:
        spatial.clear()
        pooled, logits = net(_resized_clean(images) if name == "inception-clean" else images)
        return Features(pooled=pooled.float(), logits=logits.float(), spatial=spatial[0].float())

    # Of the weights and not of a file: a downloaded network and one from a path are then the same.
    state = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    distance = "FID (clean resizing)" if name == "inception-clean" else "FID"
    return Extractor(
        name=name, distance=distance, sha256=hashlib.sha256(state).hexdigest(), channels=3, size=None, run=run
    )


def _download(url: str, name: str) -> Path:
    """Return the file of Inception's weights in torch's cache, after fetching it if it is not there."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # The file's name ends in the beginning of its SHA-256.
            torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=True)
        except (OSError, RuntimeError) as error:  # no network, no space, another checksum
            raise GaqError(
                f"Inception's weights cannot be fetched ({one_line(error)}): give their file, as {name}=PATH."
            ) from error
    return file


def _resized_clean(images: Tensor) -> Tensor:
    """Return images (N, 3, 299, 299) uint8, resized with antialiasing by clean-fid."""
    try:
        from cleanfid.resize import make_resizer
    except ImportError as error:
        raise GaqError(f"clean-fid cannot be loaded ({error}): pip install 'gaq-export[evaluate]'.") from error
    resize: Any = make_resizer("PIL", False, "bicubic", (299, 299))
    # PIL's layout there and back: (3, H, W) -> (H, W, 3) -> (299, 299, 3) -> (3, 299, 299)
    resized = [torch.from_numpy(resize(image.permute(1, 2, 0).numpy())).permute(2, 0, 1) for image in images]
    # Bicubic weights overshoot 0 and 255, and Inception takes bytes.
    return torch.stack(resized).round().clamp(0, 255).to(torch.uint8)


EXTRACTORS: Mapping[str, Callable[[str, Path | None], Extractor]] = {
    "digits": _digits,
    "resnet56": _resnet56,
    "inception": _inception,
    "inception-clean": _inception,
}
