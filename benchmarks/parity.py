"""How close are an engine, fake-quantized PyTorch and the float model, at every sampling step?

    gaq-export calibrate --model ddpm-mnist && gaq-export build-engine && python benchmarks/parity.py

All see the same inputs: trajectories of the float model from seeds that calibration never used. Two SQNRs are given
for the engine: of the predicted noise, and of the step's result x_{t-1}, which is what reaches the picture.
"""

import math
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import engines
from calib.fakequant import fake_quantized
from calib.plan import load_plan
from gaq_export import provenance, samplers
from gaq_export.denoiser import engine_denoiser
from gaq_export.parity import perturbed, sqnr_db
from gaq_export.schedule import NoiseSchedule, SamplerSpec, timesteps
from options import Out
from publish import markdown_table, publish

COLUMNS = (
    "step",
    "t",
    "engine against fake-quant: noise",
    "the same: x_{t-1}",
    "fake-quant against itself, nudged",
    "engine against float: noise",
)


def main(
    engine: Annotated[Path, typer.Option()] = Path("unet.plan"),
    run: Annotated[Path, typer.Option()] = Path("gaq-run"),
    images: Annotated[int, typer.Option()] = 8,
    out: Out = None,
) -> None:
    """Print one row a step, in dB."""
    plan = load_plan(run / "plan.safetensors")
    model = provenance.model_of(plan.about, None)
    spec = SamplerSpec.from_json(plan.about["sampler"])
    seen: list[tuple[Tensor, Tensor]] = []
    seeds = list(range(10_000, 10_000 + images))
    samplers.run(model.network, seeds, model.shape, model.schedule, spec, lambda _, x, t: seen.append((x, t)))
    quantized = fake_quantized(model.network, plan)
    rows = []
    file = engines.load_engine_file(engine)
    with engines.open_engine(file) as opened, torch.no_grad():
        for step, (x, t) in enumerate(seen):
            with perturbed(quantized, plan.layers, seed=step):
                nudged = quantized(x, t)
            expected, found = quantized(x, t), engine_denoiser(opened)(x, t)
            after = [_ddim_update(x, epsilon, step, model.schedule, spec) for epsilon in (expected, found)]
            measured = [
                sqnr_db(expected, found),
                sqnr_db(*after),
                sqnr_db(expected, nudged),
                sqnr_db(model.network(x, t), found),
            ]
            rows.append((step, int(t[0]), *measured))
    title = f"{plan.about['model']['name']} {file.about['bits']}, {file.backend}, {images} held-out images, SQNR in dB."
    columns = list(zip(*rows, strict=True))
    table = [(str(step), str(t), *(f"{v:.1f}" for v in measured)) for step, t, *measured in rows]
    table += [
        (what, "", *(f"{of(c):.1f}" for c in columns[2:]))
        for what, of in (("median", statistics.median), ("lowest", min))
    ]
    publish([title, "", *markdown_table(COLUMNS, table)], out)


def _ddim_update(x: Tensor, epsilon: Tensor, step: int, schedule: NoiseSchedule, spec: SamplerSpec) -> Tensor:
    """Return x_{t-1} of DDIM at eta = 0."""
    alpha_bar = [*schedule.alpha_bar[timesteps(spec, schedule.num_train)].tolist(), 1.0]
    a, a_prev = alpha_bar[step], alpha_bar[step + 1]
    x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
    x0 = x0 if schedule.clip is None else x0.clamp(-schedule.clip, schedule.clip)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * epsilon


if __name__ == "__main__":
    typer.run(main)
