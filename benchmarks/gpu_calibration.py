"""Calibration on a GPU: how long each phase takes, and whether the codes are the same again, and on the CPU."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calib import captured
from calib.plan import QuantPlan, load_plan
from gaq_export import run as runs
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.models.provenance import provenance_of
from gaq_export.pipeline import calibrate, preset
from gaq_export.quantize import noise_sqnr
from gaq_export.quantize.presets import CalibrationOptions, Preset
from gaq_export.quantize.verdict import Verdict, judge
from gaq_export.run import Run
from gpu_records import NotRun, Report, Request, attempt

NEVER = 1 << 62  # iterations before one is captured
FRESH = 2  # trajectories on which the large model's plans are compared
LARGE = "large"  # run folders
FIRST, AGAIN, PLAIN, HOST = "first", "again", "kernel-by-kernel", "host"


@dataclass(frozen=True, kw_only=True)
class SameCodes:
    """The share of equal codes of two plans: of all, and of each layer."""

    share: float
    layers: Mapping[str, float]

    @property
    def facts(self) -> dict[str, Any]:
        """For a finding."""
        worst = min(self.layers, key=self.layers.__getitem__)
        return {
            "equal codes, %": 100 * self.share,
            "equal codes of the median layer, %": 100 * statistics.median(self.layers.values()),
            "equal codes of the worst layer, %": 100 * self.layers[worst],
            "the worst layer": worst,
            "equal codes by layer, %": {name: 100 * share for name, share in self.layers.items()},
        }


def on_device(model: LoadedModel, request: Request) -> LoadedModel:
    """Return a model on the requested device; raise NotRun if PyTorch does not have it."""
    try:
        return model.on(request.device)
    except GaqError as error:
        raise NotRun(str(error)) from None


def calibrate_large(request: Request, report: Report) -> None:
    """Calibrate the large model at W4A8."""
    model = on_device(load_model(request.model, request.weights), request)
    chosen = preset(request.preset, CalibrationOptions(wbits=4, abits=8))
    by_cpu = None
    if request.cpu_plan is not None:
        with attempt("the CPU's plan", report) as facts:
            by_cpu = load_plan(Path(request.cpu_plan))
            entry = runs.read_record(Run(folder=Path(request.cpu_plan).parent)).last("calibrate")
            facts |= _times(entry)
    sampler = provenance_of(by_cpu).sampler if by_cpu is not None else _sampler(request)
    folder = Path(request.folder, LARGE)
    with attempt(f"{request.model} W4A8, {request.preset}, on {request.device}", report) as facts:
        facts |= _calibrated(model, chosen, folder, sampler)
    with attempt("held-out verdict", report) as facts:
        facts |= _judged(judge(folder, model))
    if by_cpu is not None:
        with attempt("codes beside the CPU's plan", report) as facts:
            ours = load_plan(Run(folder=folder).plan)
            facts |= _same_plans(ours, by_cpu).facts
            facts |= _difference(*(_held_out_db(model, plan) for plan in (ours, by_cpu)))


def calibrate_again(request: Request, report: Report) -> None:
    """Calibrate the small model twice on the device, then with every kernel launched by itself."""
    model = on_device(load_model(request.small), request)
    chosen = _small_preset(request)
    folders = {name: Path(request.folder, name) for name in (FIRST, AGAIN, PLAIN)}
    for name in (FIRST, AGAIN):
        with attempt(f"{request.small} W4A8, {request.preset}, {name}", report) as facts:
            facts |= _calibrated(model, chosen, folders[name], _sampler(request))
    with attempt("twice on the same device", report) as facts:
        first, again = (Run(folder=folders[name]).plan for name in (FIRST, AGAIN))
        facts["bit-identical"] = first.read_bytes() == again.read_bytes()
        facts |= _same_plans(load_plan(first), load_plan(again)).facts
    captured.WARM_UP = NEVER
    with attempt("fitting as CUDA graphs beside kernel by kernel", report) as facts:
        plain = _calibrated(model, chosen, folders[PLAIN], _sampler(request))
        graphs = _times(runs.read_record(Run(folder=folders[AGAIN])).last("calibrate"))
        facts |= {"fit by graphs, s": graphs.get("fit, s"), "fit kernel by kernel, s": plain.get("fit, s")}
        facts |= _same_plans(*(load_plan(Run(folder=folders[name]).plan) for name in (AGAIN, PLAIN))).facts


def calibrate_twin(request: Request, report: Report) -> None:
    """Calibrate the small model on the CPU."""
    with attempt(f"{request.small} W4A8, {request.preset}, on the CPU", report) as facts:
        model = load_model(request.small)
        facts |= _calibrated(model, _small_preset(request), Path(request.folder, HOST), _sampler(request))
        facts |= {"threads": torch.get_num_threads()} | _judged(judge(Path(request.folder, HOST), model))


def compare_with_twin(request: Request, report: Report) -> None:
    """Compare the small model's plan of the device with the CPU's."""
    with attempt("the device beside the CPU", report) as facts:
        device, host = (Path(request.folder, name) for name in (FIRST, HOST))
        facts |= _same_plans(load_plan(Run(folder=device).plan), load_plan(Run(folder=host).plan)).facts
        model = load_model(request.small)
        ours, theirs = judge(device, model), judge(host, model)
        facts |= _difference(ours.mean_db, theirs.mean_db)


def _small_preset(request: Request) -> Preset:
    return preset(request.preset, CalibrationOptions(wbits=4, abits=8))


def _sampler(request: Request) -> SamplerSpec | None:
    return None if request.calibration_steps is None else SamplerSpec(steps=request.calibration_steps)


def _calibrated(model: LoadedModel, chosen: Preset, folder: Path, sampler: SamplerSpec | None) -> dict[str, Any]:
    """Calibrate into a folder; return the seconds of each phase and the memory of the device."""
    gpu = model.device.place.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    calibrate(model, chosen, folder=folder, sampler=sampler)
    seconds = time.perf_counter() - started
    facts = {"seconds": seconds} | _times(runs.read_record(Run(folder=folder)).last("calibrate"))
    if gpu:
        facts["peak memory of the GPU, MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return facts


def _times(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of each phase, from the journal of a run."""
    return {
        "collect, s": entry.get("collect_seconds"),
        "calibrate, s": entry.get("seconds"),
        **{f"{name}, s": seconds for name, seconds in entry.get("phase_seconds", {}).items()},
    }


def _judged(verdict: Verdict) -> dict[str, Any]:
    return {
        "SQNR of the noise, dB": verdict.mean_db,
        "at its worst step, dB": min(verdict.sqnr_db),
        "PSNR of the pictures, dB": statistics.fmean(verdict.psnr_db),
    }


def _held_out_db(model: LoadedModel, plan: QuantPlan) -> float:
    """Return the mean SQNR of the predicted noise; not by `judge`, which would write beside the CPU's plan."""
    return float(noise_sqnr.of_plan(model, plan, FRESH, lambda what, done, total: None).both.mean())


def _difference(device: float, cpu: float) -> dict[str, float]:
    return {
        "held-out SQNR of the device, dB": device,
        "held-out SQNR of the CPU, dB": cpu,
        "difference, dB": device - cpu,
    }


def _same_plans(a: QuantPlan, b: QuantPlan) -> SameCodes:
    """Compare the codes of two plans; raise GaqError if they are not of one network and one config."""
    if provenance_of(a).fingerprint != provenance_of(b).fingerprint:
        raise GaqError("The plans are of other weights, so their codes cannot be compared.")
    if a.config != b.config:
        raise GaqError("The plans were calibrated with other settings, so their codes cannot be compared.")
    equal = {name: float((layer.codes == b.layers[name].codes).double().mean()) for name, layer in a.layers.items()}
    sizes = {name: layer.codes.numel() for name, layer in a.layers.items()}
    total = sum(equal[name] * sizes[name] for name in equal) / sum(sizes.values())
    return SameCodes(share=total, layers=equal)
