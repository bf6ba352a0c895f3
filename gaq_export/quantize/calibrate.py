"""Quantize a model into a run folder: draw the calibration set, make the plan, write both down.

In: a `LoadedModel` and a `Preset`. Out: a `QuantPlan`, and in the run folder everything that was computed on the way.
An interrupted calibration continues from there; a finished one is read and not repeated.
"""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib import config as configs
from calib.devices import reproducible
from calib.plan import QuantPlan, load_plan, save_plan
from calib.progress import Progress
from gaq_export import run as runs
from gaq_export.devices import ON_HOST
from gaq_export.diffusion.samplers import table
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.conditioning_request import condition_model
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import Provenance, provenance_of
from gaq_export.quantize.make_plan import SILENT, CalibrationCallbacks, make_plan
from gaq_export.quantize.network_check import check_network
from gaq_export.quantize.presets import Preset
from gaq_export.quantize.trajectories import collect
from gaq_export.run import Run

_log = logging.getLogger(__name__)


def calibrate(
    model: LoadedModel,
    chosen: Preset,
    *,
    folder: str | Path = runs.DEFAULT,
    sampler: SamplerSpec | None = None,
    callbacks: CalibrationCallbacks = SILENT,
) -> QuantPlan:
    """Quantize a model and keep everything in the run folder; the same call again continues or returns the result.

    Args:
        model: What to quantize. One that draws classes, but has no conditioning yet, draws all of them.
        chosen: How long to calibrate, and with which settings, from `preset`.
        folder: Run folder.
        sampler: Sampler that the calibration follows; the model's if None.
        callbacks: What to call meanwhile.

    Raises:
        GaqError, CalibError: Bad settings, a folder that holds another run, or one that cannot be written.
    """
    run = Run(folder=Path(folder))
    model = condition_model(model).with_sampler(sampler)
    table(model.schedule, model.spec.sampler)  # raises before a folder is made for a sampler that cannot be used
    if not run.plan.exists():  # before the folder is claimed, so that the corrected call can have the same
        check_network(model.on(ON_HOST), chosen.config)  # on the host, where graphs are exported
    provenance = Provenance.of(model, model.spec.sampler)
    # First, so that two runs with different settings never mix their files in one folder.
    runs.claim(run, _settings(model, chosen, provenance))
    if run.plan.exists():  # it is written last, so the calibration is complete
        return load_plan(run.plan)
    if model.sampler_note:
        _log.warning("%s", model.sampler_note)
    if model.conditioning is not None:
        model.conditioning.save(run.folder)
    return _calibrate_into(run, model, chosen, provenance, callbacks)


def _calibrate_into(
    run: Run, model: LoadedModel, chosen: Preset, provenance: Provenance, callbacks: CalibrationCallbacks
) -> QuantPlan:
    """Draw the calibration set, make the plan, save it, and add to the journal how long each part took."""
    phases: dict[str, float] = {}

    def on_progress(progress: Progress) -> None:
        phases.update(progress.seconds)  # each report holds the totals so far, by phase
        callbacks.on_progress(progress)

    started = time.perf_counter()
    data = collect(
        model,
        model.spec.sampler,
        images=chosen.images,
        seed=chosen.config.seed,
        folder=run.calibration,
        on_step=callbacks.on_collect,
    )
    collected = time.perf_counter()
    with reproducible(model.device.place, tf32=model.device.tf32):
        plan = make_plan(model, data, chosen.config, run.blocks, replace(callbacks, on_progress=on_progress))
    plan = replace(plan, provenance=provenance.to_json())  # `calib` knows no models, so it is added here
    save_plan(plan, run.plan)
    runs.add_entry(
        run,
        "calibrate",
        collect_seconds=round(collected - started, 1),
        seconds=round(time.perf_counter() - collected, 1),
        phase_seconds={name: round(seconds, 1) for name, seconds in phases.items()},
        peak_memory_mib=runs.peak_memory_mib(),
    )
    return plan


def _settings(model: LoadedModel, chosen: Preset, provenance: Provenance) -> dict[str, Any]:
    """Return all that the files of a run depend on, as JSON values."""
    settings = {
        "model": provenance.model_record,
        "sampler": provenance.sampler.to_json(),
        "images": chosen.images,
    }
    if model.conditioning is not None:
        settings |= {
            "conditioning": list(model.conditioning.names),
            "guidance": model.conditioning.guidance,
            "tables_sha256": model.conditioning.sha256,
        }
    # Through JSON and back, since tuples become lists there and the settings of an earlier call are compared.
    if provenance.device != "cpu":
        settings["device"] = provenance.device
    return settings | {"config": json.loads(json.dumps(configs.to_json(chosen.config)))}


def sampler_of(folder: str | Path = runs.DEFAULT) -> SamplerSpec:
    """Return the sampler that the calibration in the run folder followed; raise CalibError if there is none."""
    return provenance_of(load_plan(Run(folder=Path(folder)).plan)).sampler
