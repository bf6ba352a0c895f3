"""How far is a quantized network from the float one? The yardstick that every cell of a comparison is held to.

Three measures, on starting noise that no calibration uses (it hashes its seeds, see `quantize.trajectories`):

- error of the predicted noise at every sampling step, on the float model's own trajectories (teacher-forced);
- PSNR of the finished images against the float model's from the same noise;
- Frechet distance of those images to real ones, and to images of the float model from other noise.

What does not depend on the network under test is worked out once and kept in a folder that all cells read.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import save
from torch import Tensor

import engines
from calib.correction import Correction
from calib.fakequant import fake_quantized
from calib.files import read_safetensors, write_atomically
from calib.plan import QuantPlan
from calib.surgery import apply_surgery
from engines import EngineConfig
from gaq_export.deploy import session
from gaq_export.deploy.step_loop import engine_denoiser
from gaq_export.diffusion.conditioning import ConditionalNetwork, bind
from gaq_export.errors import GaqError
from gaq_export.evaluation import frechet
from gaq_export.evaluation.frechet import Classifier, Moments
from gaq_export.evaluation.noise_sqnr import Trajectory, record, squared_errors
from gaq_export.graph.export import export_float
from gaq_export.graph.files import save_onnx
from gaq_export.graph.profiles import find_profile
from gaq_export.graph.qdq import insert_qdq
from gaq_export.images import as_bytes, psnr
from gaq_export.models.loader import LoadedModel
from gaq_export.sampling import batches

HELD_OUT = 16  # trajectories on which the predicted noise is compared
BATCH = 8  # samples a call: more leave the cache and take a fifth longer
FIRST_SEEDS = {"same": 10_000, "reference": 20_000, "other": 30_000}  # of the sets of float images
HELD_OUT_SEEDS = range(FIRST_SEEDS["same"], FIRST_SEEDS["same"] + HELD_OUT)
DRAWS = ("engine", "pytorch")
BACKEND = "openvino"


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What quality is measured against.

    Attributes:
        model: the float model.
        folder: where everything worked out once is kept.
        images: how many images each network draws; 0 leaves images out.
        draw: who computes what a plan makes of the network: "engine" (OpenVINO) or "pytorch" (fake-quantized).
        data: .npz of real images, or None to leave the Frechet distances out.
        classifier: checkpoint of the ResNet-56 for three-channel images; None trains the digit classifier.
    """

    model: LoadedModel
    folder: Path
    images: int
    draw: str
    data: Path | None
    classifier: Path | None

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise GaqError(f"Unknown way to draw {self.draw!r}. Choose one of {list(DRAWS)}.")
        if self.data and self.model.shape[0] == 3 and not self.classifier:
            raise GaqError("Three-channel images need a trained classifier: give --features resnet56.th.")


def prepare(y: Yardstick) -> None:
    """Work out and keep everything the cells share, unless that was done before."""
    if _facts(y).exists():
        return
    facts: dict[str, Any] = {"signal": _held_out(y).epsilon.double().square().flatten(1).sum(1).tolist()}
    if y.draw == "engine":
        save_onnx(export_float(y.model.network, y.model.shape, y.model.condition_inputs), _float_graph(y))
    if y.images:
        sets = _float_images(y)
        if y.data:
            facts["frechet"] = _references(y, y.data, sets)
    write_atomically(_facts(y), json.dumps(facts, indent=1).encode())


def facts(y: Yardstick) -> dict[str, Any]:
    """Return what `prepare` found: signal energy a step, and what the Frechet distances are measured against."""
    if not _facts(y).exists():
        raise GaqError(f"{y.folder} holds no results yet: run without --report-only first.")
    found: dict[str, Any] = json.loads(_facts(y).read_text(encoding="utf-8"))
    return found


def noise_errors(y: Yardstick, network: ConditionalNetwork, correction: Correction | None = None) -> list[float]:
    """Return the squared error of the predicted noise at each sampling step, summed over the held-out images."""
    starts = range(0, HELD_OUT, BATCH)
    bound = [bind(network, y.model.conditioning, HELD_OUT_SEEDS[i : i + BATCH], apart=True) for i in starts]

    def denoise(x: Tensor, t: Tensor, /) -> Tensor:
        parts = zip(bound, torch.split(x, BATCH), torch.split(t, BATCH), strict=True)
        return torch.cat([part(some, times) for part, some, times in parts])

    return squared_errors(_held_out(y), denoise, correction)


@contextmanager
def quantized(y: Yardstick, plan: QuantPlan) -> Iterator[ConditionalNetwork]:
    """Yield what the plan makes of the network: an engine for one thread, forgotten afterwards, or in PyTorch.

    A plan whose steps differ in activation bits is no one engine, and is computed in PyTorch.
    """
    if y.draw != "engine" or plan.step_bits is not None:
        yield fake_quantized(y.model.network, plan)
        return
    network = apply_surgery(y.model.network, plan.surgery)
    known = network is y.model.network
    graph = ir.load(_float_graph(y)) if known else export_float(network, y.model.shape, y.model.condition_inputs)
    graph = insert_qdq(graph, plan, find_profile(engines.find_backend(BACKEND).profile))
    config = EngineConfig(backend=BACKEND, batch=(1, BATCH, BATCH), threads=1)
    with tempfile.TemporaryDirectory(dir=y.folder) as scratch:
        save_onnx(graph, Path(scratch, "unet.onnx"))
        file = engines.build(Path(scratch, "unet.onnx"), Path(scratch, "unet.plan"), config)
        with engines.open_engine(file) as opened:
            yield engine_denoiser(opened)


def pictures(y: Yardstick, network: ConditionalNetwork, correction: Correction | None = None) -> Tensor:
    """Draw from the noise of the float network's images, (N, C, H, W) in [-1, 1]."""
    return _draw(y, network, _seeds(y, "same"), correction)


def float_pictures(y: Yardstick) -> Tensor:
    """Return the float network's images from the same noise."""
    return _float_images(y)["same"]


def picture_measures(y: Yardstick, drawn: Tensor) -> dict[str, Any]:
    """Return PSNR of each image that `pictures` drew and, if there is data, the Frechet distances."""
    result: dict[str, Any] = {"psnr_db": [round(v, 3) for v in psnr(drawn, _float_images(y)["same"]).tolist()]}
    return result | _distances(y, _features(y, as_bytes(drawn))) if y.data else result


def _seeds(y: Yardstick, name: str) -> range:
    return range(FIRST_SEEDS[name], FIRST_SEEDS[name] + y.images)


def _draw(
    y: Yardstick, network: ConditionalNetwork, seeds: Sequence[int], correction: Correction | None = None
) -> Tensor:
    model = y.model
    spec = model.spec.sampler
    some = session.by_network(
        network,
        model.schedule,
        model.shape,
        spec,
        correction,
        model.conditioning,
        session.decoding(model.decoder),
        apart=True,
    )
    return batches.draw(some, seeds, BATCH, spec.steps, lambda done, total: None)


def _facts(y: Yardstick) -> Path:
    return y.folder / "facts.json"


def _float_graph(y: Yardstick) -> Path:
    return y.folder / "float.onnx"


def _held_out(y: Yardstick) -> Trajectory:
    """Return the float model's trajectories of the held-out images."""
    path = y.folder / "held-out.safetensors"
    if path.is_file():
        return Trajectory(**read_safetensors(path)[1])
    model = y.model
    network = bind(model.network, model.conditioning, HELD_OUT_SEEDS, apart=True)
    trajectory = record(network, HELD_OUT_SEEDS, model.shape, model.schedule, model.spec.sampler)
    write_atomically(path, save({"x": trajectory.x, "t": trajectory.t, "epsilon": trajectory.epsilon}))
    return trajectory


def _float_images(y: Yardstick) -> dict[str, Tensor]:
    """Return the float model's images, one set (N, C, H, W) for each of FIRST_SEEDS."""
    path = y.folder / "float-images.safetensors"
    if path.is_file():
        return read_safetensors(path)[1]
    sets = {name: _draw(y, y.model.network, _seeds(y, name)) for name in FIRST_SEEDS}
    write_atomically(path, save(sets))
    return sets


def _classifier(y: Yardstick) -> Classifier:
    if y.classifier:
        return frechet.resnet56(y.classifier)
    assert y.data is not None
    return frechet.digit_net(y.folder / "classifier.safetensors", y.data, y.model.shape)


def _features(y: Yardstick, images: Tensor) -> Tensor:
    return frechet.features(_classifier(y), images)


def _references(y: Yardstick, data: Path, sets: dict[str, Tensor]) -> dict[str, Any]:
    """Keep the moments of the real and the float reference; return how far float and real images are from them.

    As many test images as each network draws are set aside to measure real against real; the rest are the reference.
    """
    test = frechet.load_images(data, "test", y.model.shape)
    if len(test.images) < 2 * y.images:
        raise GaqError(f"{data} has {len(test.images)} test images; {y.images} drawn ones need at least twice as many.")
    seen = {name: _features(y, as_bytes(images)) for name, images in sets.items()}
    every = _features(y, test.images)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    aside, rest = every[order[: y.images]], every[order[y.images :]]
    references = {"real": frechet.moments(rest), "float": frechet.moments(seen["reference"])}
    tensors = {f"{n}.{part}": getattr(m, part) for n, m in references.items() for part in ("mean", "covariance")}
    write_atomically(_moments(y), save(tensors))
    return {
        "classifier": type(_classifier(y)).__name__,
        "accuracy": frechet.accuracy(_classifier(y), every, test.labels),
        "real_images": len(rest),
        "float": {name: _distances(y, seen[name]) for name in ("same", "other")},
        "real": _distances(y, aside),
    }


def _moments(y: Yardstick) -> Path:
    return y.folder / "moments.safetensors"


def _distances(y: Yardstick, features: Tensor) -> dict[str, float]:
    """Return the Frechet distances of images, given by their features (N, D), to the real and the float reference."""
    tensors, found = read_safetensors(_moments(y))[1], frechet.moments(features)

    def to(name: str) -> float:
        reference = Moments(mean=tensors[f"{name}.mean"], covariance=tensors[f"{name}.covariance"])
        return frechet.distance(found, reference)

    return {"fd_real": to("real"), "fd_float": to("float")}
