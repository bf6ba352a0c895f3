"""How far is a quantized network from the float one? The yardstick by which all cells of a comparison are measured.

Three measures, from starting noise that no calibration uses (it hashes its seeds, see `quantize.trajectories`):

- error of the predicted noise at every sampling step, on the float model's trajectories (teacher-forced);
- PSNR of the finished images against the float model's from the same noise;
- Frechet distance of those images to real ones, and to images of the float model from other noise.

Everything that does not depend on the network under test is computed once and stored in a folder that all cells read.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

import engines
from calib.correction import Correction
from calib.errors import CalibError
from calib.fakequant import fake_quantized
from calib.files import read_kept, read_safetensors, write_atomically, write_checked
from calib.leftovers import temporary_name
from calib.plan import QuantPlan
from calib.records import Finite, read_kept_record, signed
from calib.surgery import apply_surgery
from engines import EngineConfig
from gaq_export.deploy import session
from gaq_export.devices import ON_HOST
from gaq_export.diffusion.batching import draw_in_batches
from gaq_export.diffusion.conditioning import ConditionalNetwork, bind
from gaq_export.diffusion.denoiser import engine_denoiser
from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet
from gaq_export.evaluation.frechet import Classifier, Moments
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.images import psnr, to_uint8_tensor
from gaq_export.models.loader import LoadedModel
from gaq_export.quantize.noise_sqnr import Trajectory, record, squared_errors

HELD_OUT = 16  # trajectories on which the predicted noise is compared
BATCH = 8  # samples a call: more leave the cache and take a fifth longer
FIRST_SEEDS = {"same": 10_000, "reference": 20_000, "other": 30_000}  # of the sets of float images
HELD_OUT_SEEDS = range(FIRST_SEEDS["same"], FIRST_SEEDS["same"] + HELD_OUT)
BACKEND = "openvino"


class ComputedBy(StrEnum):
    """What computes a quantized network: an OpenVINO engine, or fake quantization in PyTorch."""

    ENGINE = "engine"
    PYTORCH = "pytorch"


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What quality is measured against.

    Attributes:
        model: the float model.
        folder: where everything that is computed once is stored.
        images: how many images each network draws; 0 for none.
        computed_by: what computes the quantized networks.
        data: .npz of real images; None for no Frechet distances.
        classifier: checkpoint of the ResNet-56 for three-channel images; None trains the digit classifier.
    """

    model: LoadedModel
    folder: Path
    images: int
    computed_by: ComputedBy = ComputedBy.ENGINE
    data: Path | None = None
    classifier: Path | None = None

    def __post_init__(self) -> None:
        if self.data and self.model.shape[0] == 3 and not self.classifier:
            raise GaqError("Three-channel images need a trained classifier: give --features resnet56.th.")
        if self.images and self.model.decoder is None and self.model.shape[0] not in (1, 3):
            raise GaqError(
                f"{self.model.spec.name} draws {self.model.shape[0]} channels, and pictures have 1 or 3: compare "
                "without pictures (--images 0)."
            )

    @property
    def facts_path(self) -> Path:
        """What `prepare` writes last, JSON."""
        return self.folder / "facts.json"

    @property
    def float_graph(self) -> Path:
        """The float network as ONNX."""
        return self.folder / "float.onnx"

    @property
    def moments_path(self) -> Path:
        """Moments of the real and the float reference images."""
        return self.folder / "moments.safetensors"

    def seeds(self, name: str) -> range:
        """Return the seeds of a set of float images, a key of FIRST_SEEDS."""
        return range(FIRST_SEEDS[name], FIRST_SEEDS[name] + self.images)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Frechet distances of one set of images, to real images and to the float network's."""

    fd_real: Finite
    fd_float: Finite


@dataclass(frozen=True, kw_only=True)
class FrechetFacts:
    """What Frechet distances are measured with.

    Attributes:
        classifier: name of the network that makes the features.
        accuracy: share of the real test images that it classifies correctly.
        real_images: in the reference.
        drawn: distances of the float network's images, by the names of their noise, "same" and "other".
        real: distances of real images that were set aside.
    """

    classifier: str
    accuracy: float
    real_images: int
    drawn: Mapping[str, Distances]
    real: Distances


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What all cells share: |epsilon|^2 at each step, and the Frechet references if there are real images."""

    signal: tuple[NonNegativeFloat, ...]
    frechet: FrechetFacts | None


def prepare(yardstick: Yardstick) -> None:
    """Compute and store everything that the cells share, unless that was done before."""
    if _kept_facts(yardstick) is not None:
        return
    signal = _held_out(yardstick).epsilon.double().square().flatten(1).sum(1)  # (S, N, C, H, W) -> (S,)
    frechet = None
    if yardstick.computed_by is ComputedBy.ENGINE:
        model = yardstick.model.on(ON_HOST)
        save_onnx(export_float(model.network, model.shape, model.condition_inputs), yardstick.float_graph)
    if yardstick.images:
        sets = _float_images(yardstick)
        if yardstick.data:
            frechet = _references(yardstick, yardstick.data, sets)
    # Written last: its presence says that everything else is there.
    shared = Facts(signal=tuple(signal.tolist()), frechet=frechet)
    write_atomically(yardstick.facts_path, signed(asdict(shared)))


def facts(yardstick: Yardstick) -> Facts:
    """Return what `prepare` stored.

    Raises:
        GaqError: `prepare` was not called, or what it stored was altered.
    """
    kept = _kept_facts(yardstick)
    if kept is None:
        raise GaqError(f"{yardstick.folder} holds no results yet, or damaged ones: run without --report-only first.")
    return kept


def _kept_facts(yardstick: Yardstick) -> Facts | None:
    """Return what `prepare` stored, None if that has to be done (again)."""
    kept = read_kept_record(Facts, yardstick.facts_path)
    if kept is None or kept.frechet is None:
        return kept
    moments = read_kept(yardstick.moments_path, lambda header, tensors: tensors)
    return None if moments is None else kept


def noise_errors(
    yardstick: Yardstick, network: ConditionalNetwork, correction: Correction | None = None
) -> list[float]:
    """Return the squared error of the predicted noise at each sampling step, summed over the held-out images."""
    conditioning = yardstick.model.conditioning
    starts = range(0, HELD_OUT, BATCH)
    # One denoiser a batch, because conditioning depends on which images are in it.
    bound = [bind(network, conditioning, HELD_OUT_SEEDS[i : i + BATCH], apart=True) for i in starts]
    place = yardstick.model.device.place  # an engine takes tensors of any device

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        parts = zip(bound, torch.split(x, BATCH), torch.split(t, BATCH), strict=True)
        return torch.cat([denoiser(images.to(place), times.to(place)).cpu() for denoiser, images, times in parts])

    return squared_errors(_held_out(yardstick), denoise, correction)


@contextmanager
def quantized(yardstick: Yardstick, plan: QuantPlan) -> Iterator[ConditionalNetwork]:
    """Yield the network as a plan quantizes it: an engine of one thread, deleted afterwards, or in PyTorch.

    A plan whose steps differ in activation bits needs several engines, so PyTorch computes it.
    """
    model = yardstick.model
    if yardstick.computed_by is ComputedBy.PYTORCH or plan.step_bits is not None:
        yield fake_quantized(model.network, plan)
        return
    model = model.on(ON_HOST)  # where graphs are exported
    network = apply_surgery(model.network, plan.surgery)
    unchanged = network is model.network  # then the graph that `prepare` exported serves
    graph = ir.load(yardstick.float_graph) if unchanged else export_float(network, model.shape, model.condition_inputs)
    graph = insert_qdq(graph, plan, find_profile(engines.find_backend(BACKEND).profile))
    # One thread, since several cells may run at a time, and with one the sums have one order.
    config = EngineConfig(backend=BACKEND, batch=(1, BATCH, BATCH), threads=1)
    folder = yardstick.folder
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{temporary_name(folder, 'engine')}.") as scratch:
        save_onnx(graph, Path(scratch, "unet.onnx"))
        file = engines.build(Path(scratch, "unet.onnx"), Path(scratch, "unet.plan"), config)
        with engines.open_engine(file) as opened:
            yield engine_denoiser(opened)


def draw_images(yardstick: Yardstick, network: ConditionalNetwork, correction: Correction | None = None) -> Tensor:
    """Draw from the same noise as the float network did, (N, C, H, W) in [-1, 1]."""
    return _draw(yardstick, network, yardstick.seeds("same"), correction)


def float_images(yardstick: Yardstick) -> Tensor:
    """Return the float network's images from the same noise, (N, C, H, W) in [-1, 1]."""
    return _float_images(yardstick)["same"]


def image_scores(yardstick: Yardstick, images: Tensor) -> dict[str, Any]:
    """Return the PSNR of each of the images of `draw_images` and, if there is data, the Frechet distances."""
    near = psnr(images, float_images(yardstick))  # (N,), pair by pair: both are from the same noise
    result: dict[str, Any] = {"psnr_db": [round(v, 3) for v in near.tolist()]}
    if yardstick.data:
        # As bytes, like the real images: rounding to 256 levels must not count as a difference.
        result |= asdict(_distances(yardstick, _features(yardstick, to_uint8_tensor(images))))
    return result


def _draw(
    yardstick: Yardstick, network: ConditionalNetwork, seeds: Sequence[int], correction: Correction | None = None
) -> Tensor:
    sampling = replace(yardstick.model.image_sampling(), correction=correction)
    # Apart: guidance in one call would double the batch, which an engine of BATCH cannot take.
    draw = session.draw_with_network(network, sampling, apart=True)
    return draw_in_batches(draw, seeds, BATCH, sampling.sampler.steps, lambda done, total: None)


def _held_out(yardstick: Yardstick) -> Trajectory:
    """Return the float model's trajectories of the held-out images."""
    path = yardstick.folder / "held-out.safetensors"

    def parse(header: dict[str, str], tensors: dict[str, Tensor]) -> Trajectory:
        if tensors.keys() != {"x", "t", "epsilon"}:
            raise CalibError(f"{path} holds {sorted(tensors)} in place of trajectories.")
        return Trajectory(**tensors)

    if (kept := read_kept(path, parse)) is not None:
        return kept
    model = yardstick.model
    network = bind(model.network, model.conditioning, HELD_OUT_SEEDS, apart=True)
    trajectory = record(network, HELD_OUT_SEEDS, model.sampling())
    write_checked(path, {"x": trajectory.x, "t": trajectory.t, "epsilon": trajectory.epsilon})
    return trajectory


def _float_images(yardstick: Yardstick) -> dict[str, Tensor]:
    """Return the float model's images, one set (N, C, H, W) for each of FIRST_SEEDS."""
    path = yardstick.folder / "float-images.safetensors"

    def parse(header: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if {name: len(images) for name, images in tensors.items()} != dict.fromkeys(FIRST_SEEDS, yardstick.images):
            raise CalibError(f"{path} does not hold {yardstick.images} images for each of {list(FIRST_SEEDS)}.")
        return tensors

    if (kept := read_kept(path, parse)) is not None:
        return kept
    # Three sets: one to pair with the quantized images, one as the reference, one to measure float against float.
    sets = {name: _draw(yardstick, yardstick.model.network, yardstick.seeds(name)) for name in FIRST_SEEDS}
    write_checked(path, sets)
    return sets


def _classifier(yardstick: Yardstick) -> Classifier:
    if yardstick.classifier:
        return frechet.resnet56(yardstick.classifier)
    assert yardstick.data is not None
    path = yardstick.folder / "classifier.safetensors"
    if read_kept(path, lambda header, tensors: tensors) is None:
        path.unlink(missing_ok=True)  # trained again
    return frechet.digit_net(path, yardstick.data, yardstick.model.shape)


def _features(yardstick: Yardstick, images: Tensor) -> Tensor:
    return frechet.features(_classifier(yardstick), images)


def _references(yardstick: Yardstick, data: Path, sets: dict[str, Tensor]) -> FrechetFacts:
    """Store the moments of the real and the float reference; return how far float and real images are from them.

    As many test images as each network draws are set aside to measure real against real; the rest are the reference.
    """
    count = yardstick.images
    test = frechet.load_images(data, "test", yardstick.model.shape)
    if len(test.images) < 2 * count:
        raise GaqError(f"{data} has {len(test.images)} test images; {count} drawn ones need at least twice as many.")
    drawn = {name: _features(yardstick, to_uint8_tensor(images)) for name, images in sets.items()}
    real = _features(yardstick, test.images)
    # Shuffled, since a test set may be sorted by class; by a fixed seed, so that every folder has the same reference.
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    aside, rest = real[order[:count]], real[order[count:]]
    references = {"real": frechet.moments(rest), "float": frechet.moments(drawn["reference"])}
    tensors = {f"{n}.{part}": getattr(m, part) for n, m in references.items() for part in ("mean", "covariance")}
    write_checked(yardstick.moments_path, tensors)
    return FrechetFacts(
        classifier=type(_classifier(yardstick)).__name__,
        accuracy=frechet.accuracy(_classifier(yardstick), real, test.labels),
        real_images=len(rest),
        drawn={name: _distances(yardstick, drawn[name]) for name in ("same", "other")},
        real=_distances(yardstick, aside),
    )


def _distances(yardstick: Yardstick, features: Tensor) -> Distances:
    """Return the Frechet distances of images, as features (N, D), to the real and to the float reference."""
    tensors = read_safetensors(yardstick.moments_path, checked=True)[1]
    moments = frechet.moments(features)

    def distance_to(name: str) -> float:
        reference = Moments(mean=tensors[f"{name}.mean"], covariance=tensors[f"{name}.covariance"])
        return frechet.distance(moments, reference)

    return Distances(fd_real=distance_to("real"), fd_float=distance_to("float"))
