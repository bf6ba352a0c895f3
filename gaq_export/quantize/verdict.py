"""Did quantization ruin the network? The plan against the float network, on trajectories calibration did not see.

In: a run folder with a finished plan. Out: a `Verdict`, kept in `verdict.json` with the sha256 of its plan, so that it
is measured once. Other checks compare an engine with fake-quantized PyTorch; none of them would notice a network that
was ruined before.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from calib.fakequant import fake_quantized
from calib.files import write_atomically
from calib.plan import QuantPlan, load_plan
from calib.records import Sha256, read_kept_record, signed
from calib.sqnr import EQUAL_DB, sqnr_db
from engines.files import sha256_of
from gaq_export import run as runs
from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import bind
from gaq_export.diffusion.loop import Sampling
from gaq_export.images import psnr
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import find_model, provenance_of, rewritten
from gaq_export.quantize.float_engine import GROUP
from gaq_export.quantize.noise_sqnr import OnStage, corrected, follow
from gaq_export.quantize.sensitivity import sensitivity
from gaq_export.quantize.trajectories import collect, image_seed
from gaq_export.run import Run

IMAGES = 2  # held-out trajectories
POOR_DB = 20.0  # below this, the layers that cost most are named
NAMED = 3  # of those layers
_ADVICE = "Delete it, and it is measured again"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far a plan is from its float network.

    Attributes:
        plan_sha256: of the plan's file.
        sqnr_db: of the predicted noise at each step, over IMAGES held-out float trajectories together, (S,).
        psnr_db: of the pictures that the fake-quantized network draws from the same noise, a value a trajectory.
        costliest: if the verdict is poor, the layers that cost most: their share of the error, each quantized alone.
    """

    plan_sha256: Sha256
    sqnr_db: tuple[float, ...]
    psnr_db: tuple[float, ...]
    costliest: Mapping[str, float]

    @property
    def mean_db(self) -> float:
        """The mean SQNR of the predicted noise."""
        return statistics.fmean(self.sqnr_db)

    @property
    def db(self) -> float:
        """What is judged: the mean SQNR of the predicted noise or the mean PSNR of the pictures, the lower of both."""
        return min(self.mean_db, statistics.fmean(self.psnr_db))

    @property
    def poor(self) -> bool:
        """Whether the pictures will probably be others than the float network's."""
        return self.db < POOR_DB

    @property
    def line(self) -> str:
        """The verdict in a sentence."""
        worst = min(range(len(self.sqnr_db)), key=self.sqnr_db.__getitem__)
        return (
            f"against the float network, on {len(self.psnr_db)} held-out trajectories: predicted noise "
            f"{self.mean_db:.1f} dB SQNR in the mean, {self.sqnr_db[worst]:.1f} dB at its worst step {worst}; "
            f"pictures {statistics.fmean(self.psnr_db):.1f} dB PSNR, predicted"
        )

    @property
    def warning(self) -> str:
        """What is wrong and what to do, if the verdict is poor."""
        shares = ", ".join(f"{name!r} {share:.0%}" for name, share in self.costliest.items())
        blame = f" Layers that cost most, each quantized alone: {shares} of the error." if shares else ""
        first = next(iter(self.costliest), None)
        remedy = f"leave layers float (--keep-float {first!r}), " if first else ""
        return (
            f"{self.db:.1f} dB is poor (under {POOR_DB:g} dB): the pictures will not be the float network's.{blame} "
            f"To mend it, {remedy}give more bits (--wbits, --abits) or try another recipe (`gaq-export recipes`)."
        )


def judge(
    folder: str | Path = runs.DEFAULT,
    model: LoadedModel | None = None,
    on_step: OnStage = lambda what, done, total: None,
) -> Verdict:
    """Return the verdict on the plan in a run folder: the recorded one, or a new one that is recorded.

    Args:
        folder: run folder with a finished plan.
        model: the float model; loaded again from the plan's record if None and if it is needed.
        on_step: called with (what is being done, done, total).

    Raises:
        GaqError, CalibError: no plan, another model, or a folder that cannot be written.
    """
    run = Run(folder=Path(folder))
    plan = load_plan(run.plan)
    recorded = read_kept_record(Verdict, run.verdict)
    if recorded is not None and recorded.plan_sha256 == sha256_of(run.plan):
        return recorded
    verdict = _measure(run, plan, find_model(provenance_of(plan), model, run.folder), on_step)
    write_atomically(run.verdict, signed(asdict(verdict)))
    return verdict


def _measure(run: Run, plan: QuantPlan, model: LoadedModel, on_step: OnStage) -> Verdict:
    spec = provenance_of(plan).sampler
    # Hashed under a purpose, so these are never the seeds of calibration images.
    seeds = [image_seed(plan.config.seed, i, "verdict") for i in range(IMAGES)]
    noise, pictures = _compare(model, plan, seeds, model.image_sampling(spec), on_step)
    verdict = Verdict(plan_sha256=sha256_of(run.plan), sqnr_db=noise, psnr_db=pictures, costliest={})
    if not verdict.poor:
        return verdict
    data = collect(model, spec, images=GROUP, seed=plan.config.seed, folder=run.calibration)
    errors = sensitivity(rewritten(model, plan), plan, data, on_step)
    total = sum(errors.values())
    costly = sorted(errors, key=errors.__getitem__, reverse=True)[:NAMED]
    return replace(verdict, costliest={name: errors[name] / total for name in costly if total > 0})


def _compare(
    model: LoadedModel, plan: QuantPlan, seeds: Sequence[int], sampling: Sampling, on_step: OnStage
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the SQNR of the noise along the float network's trajectories, and the PSNR of the quantized pictures."""
    steps = sampling.sampler.steps
    network = fake_quantized(model.network, plan)
    exact, quantized = (bind(one, model.conditioning, seeds) for one in (model.network, network))
    report = partial(on_step, "judging the quantized network, step")
    decibels: list[float] = []

    def visit(x: Tensor, t: Tensor, epsilon: Tensor) -> None:
        predicted = corrected(quantized(x, t), plan.correction, len(decibels))
        decibels.append(sqnr_db(epsilon, predicted))
        report(len(decibels), 2 * steps)

    expected = follow(exact, seeds, sampling, visit)
    drawn = loop.run(
        network,
        seeds,
        replace(sampling, correction=plan.correction),
        lambda step, x, t: report(steps + step + 1, 2 * steps),
    )
    if sampling.decode is None and sampling.schedule.clip is None:
        # Latents have no bounds: by those of the float network's, they are brought into the range of images.
        reach = expected.abs().amax().clamp(min=1e-30)
        expected, drawn = expected / reach, drawn / reach
    return tuple(decibels), tuple(psnr(drawn, expected).clamp(max=EQUAL_DB).tolist())
