"""Pictures of the float network and of quantized ones from the same seeds: are they the same, and as good?"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.devices import on_device as module_on_device
from calib.fakequant import fake_quantized
from calib.plan import QuantPlan, load_plan
from calib.sqnr import EQUAL_DB
from gaq_export.diffusion import loop
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.evaluation import feature_metrics, frechet
from gaq_export.evaluation.feature_extractors import DIGITS
from gaq_export.images import psnr, to_uint8_tensor
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.pipeline import calibrate, preset
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.run import Run
from gpu_calibration import LARGE, on_device
from gpu_records import Report, Request, attempt

FLOAT, W8, W4 = "float", "W8A8", "W4A8"
SCORING = 0.3  # of the time
DRAWS = 100  # of a bootstrap
FEWEST = 2  # images of which a distance can be computed


class _Gallery:
    """What was drawn so far.

    Args:
        request: of the stage.
        model: the float model, on the device.
        networks: by name, FLOAT first.
    """

    def __init__(self, request: Request, model: LoadedModel, networks: dict[str, nn.Module]) -> None:
        self._request, self._model, self._networks = request, model, networks
        self._sampling = model.sampling(SamplerSpec(steps=request.steps))
        if request.tf32:
            self._sampling = replace(self._sampling, device=replace(model.device, tf32=True))
        self._seconds: dict[str, list[float]] = {name: [] for name in networks}
        self._sizes: list[int] = []
        self._decibels: dict[str, list[Tensor]] = {name: [] for name in networks}
        self._images: dict[str, list[Tensor]] = {name: [] for name in networks}

    def draw(self, seeds: Sequence[int]) -> None:
        """Draw one image for each seed, with every network."""
        self._sizes.append(len(seeds))
        exact = None
        for name, network in self._networks.items():
            started = time.perf_counter()
            drawn = loop.run(network, seeds, self._sampling)  # returns on the host, so nothing is left to wait for
            self._seconds[name].append(time.perf_counter() - started)
            exact = drawn if exact is None else exact
            self._decibels[name].append(psnr(drawn, exact).clamp(max=EQUAL_DB))
            self._images[name].append(to_uint8_tensor(drawn))

    def images(self, name: str) -> Tensor:
        """Return a network's images, (N, C, H, W) uint8."""
        return torch.cat(self._images[name])

    def report(self, report: Report) -> None:
        """Report the PSNR to the float network's images, and the speed."""
        for name in self._networks:
            with attempt(f"{name}, drawn", report) as facts:
                facts |= {"images": sum(self._sizes), "images a second": self._speed(name)}
                if name != FLOAT:
                    decibels = torch.cat(self._decibels[name])
                    facts |= {
                        "PSNR to float, median dB": float(decibels.median()),
                        "PSNR to float, worst dB": float(decibels.min()),
                    }

    def _speed(self, name: str) -> float:
        # The first batch warms up, if there is another.
        rest = slice(1, None) if len(self._sizes) > 1 else slice(None)
        return sum(self._sizes[rest]) / sum(self._seconds[name][rest])


def draw_all(request: Request, report: Report) -> None:
    """Draw as many images as there is time for, then score them."""
    started = time.perf_counter()
    model = on_device(load_model(request.model, request.weights), request)
    networks = {FLOAT: model.network}
    for name, bits in ((W8, 8), (W4, 4)):
        with attempt(f"{name}, its plan", report) as facts:
            plan, facts["made by"] = _plan(request, model, bits)
            networks[name] = fake_quantized(model.network, plan)
    gallery = _Gallery(request, model, networks)
    drawn = 0
    with attempt("images", report) as facts:
        while drawn < request.images and time.perf_counter() - started < (1 - SCORING) * request.seconds:
            size = min(request.batch, request.images - drawn)
            gallery.draw(range(drawn, drawn + size))
            drawn += size
            gallery.report(report)
        facts |= {"drawn": drawn, "asked for": request.images, "DDIM steps": request.steps, "batch": request.batch}
        facts["TF32"] = request.tf32
    if drawn >= FEWEST:
        _score(request, model, gallery, [name for name in networks if name != FLOAT], report)


def _plan(request: Request, model: LoadedModel, bits: int) -> tuple[QuantPlan, str]:
    """Return a plan with so many bits for weights, and how it was made."""
    large = Run(folder=Path(request.folder, LARGE))
    if bits == 4 and large.plan.exists():
        return load_plan(large.plan), f"the calibration above, {request.preset}"
    # At 8 bits there is next to nothing to learn; at 4 this is what a calibration that did not finish leaves.
    options = CalibrationOptions(wbits=bits, abits=8, omega="uniform", iterations=1)
    folder = Path(request.folder, f"quick-w{bits}")
    if large.calibration.is_dir() and not folder.exists():
        shutil.copytree(large.calibration, Run(folder=folder).calibration)  # the same trajectories
    sampler = None if request.calibration_steps is None else SamplerSpec(steps=request.calibration_steps)
    plan = calibrate(model, preset(request.preset, options), folder=folder, sampler=sampler)
    return plan, f"GPTQ's rounding and one iteration, ranges as by {request.preset}"


class _Features:
    """Makes features on the device, for one kind of images."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self._request, self._device = request, device

    @cached_property
    def name(self) -> str:
        """Of the distance."""
        return "Frechet distance (digits)" if self._request.digits else "Frechet distance (ResNet-56)"

    @cached_property
    def _classifier(self) -> nn.Module:
        if self._request.digits:
            return module_on_device(frechet.digit_net(DIGITS, DIGITS, (1, 32, 32)), self._device)
        if self._request.classifier is None:
            raise ValueError("no classifier was given: --classifier")
        return module_on_device(frechet.resnet56(Path(self._request.classifier)), self._device)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images (N, C, H, W) uint8, on the host."""
        made: Tensor = frechet.features(self._classifier, images.to(self._device))  # type: ignore[arg-type]
        return made.cpu()


def _score(request: Request, model: LoadedModel, gallery: _Gallery, names: list[str], report: Report) -> None:
    """Report the Frechet distance of each network's images to real ones, and to the float network's."""
    features = _Features(request, model.device.place)
    made: dict[str, Tensor] = {}
    with attempt("features", report) as facts:
        made |= {name: features(gallery.images(name)) for name in (FLOAT, *names)}
        facts["of"] = features.name
    for name in names if made else ():
        with attempt(f"{name}, {features.name} to float", report) as facts:
            facts |= _distance(made[name], made[FLOAT])
    if not made or request.data is None:
        return
    with attempt("real images", report) as facts:
        made["real"] = features(frechet.load_images(Path(request.data), "test", model.shape).images)
        size = min(len(made[FLOAT]), len(made["real"]) // 2)
        facts |= {"images": len(made["real"]), "floor, of as many": feature_metrics.floor(made["real"], size)}
    for name in (FLOAT, *names) if "real" in made else ():
        with attempt(f"{name}, {features.name} to real images", report) as facts:
            facts |= _distance(made[name], made["real"])


def _distance(images: Tensor, reference: Tensor) -> dict[str, float]:
    interval = feature_metrics.interval(images, reference, DRAWS)
    return {"distance": interval.value, "95 % from": interval.low, "95 % to": interval.high}
