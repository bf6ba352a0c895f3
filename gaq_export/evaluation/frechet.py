"""The Frechet distance between two sets of images, in the features of a classifier of the same kind of images.

A set of images becomes the mean m (D,) and covariance S (D, D) of its features. As in FID (Heusel et al. 2017) the
distance is given squared:

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2)

The features are not Inception's, so no value here can be compared with a published FID; 64 dimensions instead of 2048
make a few hundred images enough to see a difference, though a small set is always further away than a large one. There
are two classifiers: a small one for digits, trained here in a minute, and a ResNet-56 for CIFAR-10, from a checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.files import read_safetensors, write_checked
from gaq_export.errors import GaqError, one_line
from gaq_export.evaluation import image_files
from gaq_export.evaluation.foreign_weights import read_state

BATCH = 250
EPOCHS = 3
TRAIN_BATCH = 128
RATE = 2e-3
DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images (N, C, H, W) uint8 and their classes (N,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean (D,) and covariance (D, D) of feature vectors, float64."""

    mean: Tensor
    covariance: Tensor


class Classifier(Protocol):
    """A trained network that sees images as `pixels` makes them; `linear` turns features into class scores."""

    linear: nn.Linear

    def features(self, x: Tensor, /) -> Tensor:
        """Return its penultimate layer, (N, D)."""


def moments(features: Tensor) -> Moments:
    """Return mean and covariance of `features` (N, D)."""
    values = features.double()  # a distance is a small difference of large sums
    return Moments(mean=values.mean(0), covariance=torch.cov(values.T))


def distance(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance of two Gaussians with these moments."""
    root = _root(a.covariance)
    # The trace of the root is the sum of the roots of the eigenvalues, so the root itself is never needed.
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    total = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return float(total)


def _root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance; rounding may have made an eigenvalue of 0 negative."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # V diag(sqrt(w)) V', (D, D)
    return root


def pixels(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1], as the diffusion models see them."""
    return images.float() / 127.5 - 1


def features(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the features (N, D) of uint8 images (N, C, H, W)."""
    with torch.no_grad():
        return torch.cat([classifier.features(pixels(part)) for part in torch.split(images, BATCH)])


def accuracy(classifier: Classifier, features: Tensor, labels: Tensor) -> float:
    """Return the share of images, given by their features (N, D), that are classified correctly."""
    with torch.no_grad():
        return float((classifier.linear(features).argmax(1) == labels).double().mean())


def load_images(path: Path, part: str, shape: tuple[int, int, int]) -> Labelled:
    """Read `part` ("train" or "test") of an .npz, padded with black to `shape` (C, H, W).

    The file holds `<part>_images` and `<part>_labels`, or, if it is a test set alone, `images` and `labels`.

    Raises:
        GaqError: the file is damaged, there are no such arrays, or they do not fit the model.
    """
    names = [f"{part}_images"] + ["images"] * (part == "test")
    array = image_files.read_images(path, names)
    channels, height, width = shape
    if array.shape[3] != channels or array.shape[1] > height or array.shape[2] > width:
        raise GaqError(f"{path} has {array.dtype} images {array.shape[1:]}; the model draws {shape} (C, H, W).")
    labels = image_files.read_labels(path, [name.replace("images", "labels") for name in names], len(array))
    return Labelled(images=padded(array, height, width), labels=labels)


def padded(array: npt.NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Return images (N, H, W, C) as (N, C, height, width), black around them."""
    down, right = height - array.shape[1], width - array.shape[2]
    # An odd row or column goes below or to the right.
    around = ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return torch.from_numpy(np.pad(array, around)).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)


class DigitNet(nn.Module):
    """Three strided convolutions and two linears for one-channel 32x32 images; 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        )
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.linear = nn.Linear(64, DIGITS)

    def features(self, x: Tensor) -> Tensor:
        """Return the rectified hidden layer, (N, 64)."""
        return F.relu(self.hidden(self.convolutions(x).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores, (N, 10)."""
        scores: Tensor = self.linear(self.features(x))
        return scores


def digit_net(path: Path, data: Path, shape: tuple[int, int, int]) -> DigitNet:
    """Return the digit classifier stored at `path`; train it on the training images of `data` if it is not there."""
    # Initial weights by a fixed seed, without touching the caller's generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitNet()
    if path.is_file():
        try:
            net.load_state_dict(read_safetensors(path)[1])
        except RuntimeError as error:
            raise GaqError(f"{path} is not a classifier of examples/train_digits.py: {one_line(error)}") from error
    else:
        _train(net, load_images(data, "train", shape))
        write_checked(path, net.state_dict())
    return net.eval()


def _train(net: nn.Module, data: Labelled) -> None:
    """Train with Adam, its rate falling linearly to 0, on every image EPOCHS times, seed 0."""
    if (largest := int(data.labels.max())) >= DIGITS:
        raise GaqError(f"The training labels go up to {largest}; expected digits, 0 to {DIGITS - 1}.")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(data.images), generator=generator) for _ in range(EPOCHS)]
    batches = [index for order in orders for index in torch.split(order, TRAIN_BATCH)]
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    for i, index in enumerate(batches):
        optimiser.param_groups[0]["lr"] = RATE * (1 - i / len(batches))
        loss = F.cross_entropy(net(pixels(data.images[index])), data.labels[index])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()


class _Residual(nn.Module):
    """A basic block whose shortcut drops every other pixel and pads channels with zeros ("option A")."""

    def __init__(self, width: int, planes: int) -> None:
        super().__init__()
        self.stride = planes // width
        self.conv1 = nn.Conv2d(width, planes, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Half of the new channels before the old ones and half behind, as in the checkpoint's code.
        missing = out.shape[1] - x.shape[1]
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, missing // 2, missing // 2))
        return F.relu(out + shortcut)


class ResNet56(nn.Module):
    """The ResNet-56 of He et al. 2016 for CIFAR-10, with the layer names of akamaster/pytorch_resnet_cifar10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Residual(16, 16) for _ in range(9)))
        self.layer2 = nn.Sequential(_Residual(16, 32), *(_Residual(32, 32) for _ in range(8)))
        self.layer3 = nn.Sequential(_Residual(32, 64), *(_Residual(64, 64) for _ in range(8)))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return the pooled last layer, (N, 64); `x` is in [-1, 1] and is normalised here as in training."""
        # ImageNet's statistics, which that repository trains CIFAR-10 with.
        mean = torch.tensor((0.485, 0.456, 0.406)).to(x.device)[:, None, None]
        deviation = torch.tensor((0.229, 0.224, 0.225)).to(x.device)[:, None, None]
        h = F.relu(self.bn1(self.conv1(((x + 1) / 2 - mean) / deviation)))
        pooled: Tensor = self.layer3(self.layer2(self.layer1(h))).mean((2, 3))  # (N, 64, 8, 8) -> (N, 64)
        return pooled


def resnet56(path: Path) -> ResNet56:
    """Load a checkpoint of akamaster/pytorch_resnet_cifar10; raise GaqError if it is another network's."""
    net = ResNet56()
    state = read_state(path)
    try:
        net.load_state_dict({str(name).removeprefix("module."): value for name, value in state.items()})
    except RuntimeError as error:
        raise GaqError(f"{path} is not a ResNet-56 of akamaster/pytorch_resnet_cifar10: {one_line(error)}") from error
    return net.eval()
