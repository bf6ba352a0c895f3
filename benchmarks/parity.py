"""How close are an engine, fake-quantized PyTorch and the float model, at every sampling step?

    gaq-export calibrate --model ddpm-mnist && gaq-export build-engine && python benchmarks/parity.py

All see the same inputs: trajectories of the float model from seeds that calibration never used. Two SQNRs are given
for the engine: of the predicted noise, and of the step's result x_{t-1}, which is what reaches the picture.
"""

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import engines
from calib.fakequant import fake_quantized
from calib.plan import load_plan
from calib.sqnr import sqnr_db
from command import write_markdown
from gaq_export.deploy import session
from gaq_export.deploy.parity import PERTURBATION, perturbed
from gaq_export.deploy.record import record_of
from gaq_export.diffusion import loop, samplers
from gaq_export.models.provenance import find_model, provenance_of
from gaq_export.report.markdown import markdown_table
from options import Out

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
    file, plan = engines.load_engine_file(engine), load_plan(run / "plan.safetensors")
    model = find_model(provenance_of(plan), None, run)
    record = record_of(file)
    spec = record.provenance.sampler
    seen: list[tuple[Tensor, Tensor]] = []
    seeds = list(range(10_000, 10_000 + images))
    loop.run(model.network, seeds, model.sampling(spec), lambda _, x, t: seen.append((x, t)))
    rows = []
    left = {name: layer for name, layer in plan.layers.items() if name not in record.tables}
    quantized = fake_quantized(model.network, plan)
    sampler = samplers.table(model.schedule, spec)
    with engines.open_engine(file) as opened, torch.no_grad():
        for step, (x, t) in enumerate(seen):
            with perturbed(quantized, left, PERTURBATION["float32"], seed=step):
                nudged = quantized(x, t)
            expected, found = quantized(x, t), session.noise_predictor(opened, file)(x, t)
            after = [
                samplers.update(sampler[step], model.schedule.clip, x, e, torch.zeros_like(x), None)[0]
                for e in (expected, found)
            ]
            measured = [
                sqnr_db(expected, found),
                sqnr_db(*after),
                sqnr_db(expected, nudged),
                sqnr_db(model.network(x, t), found),
            ]
            rows.append((step, int(t[0]), *measured))
    name = record.provenance.name
    title = f"{name} {record.bits}, {file.backend}, {images} held-out images, SQNR in dB."
    columns = list(zip(*rows, strict=True))
    table = [(str(step), str(t), *(f"{v:.1f}" for v in measured)) for step, t, *measured in rows]
    table += [
        (what, "", *(f"{of(c):.1f}" for c in columns[2:]))
        for what, of in (("median", statistics.median), ("lowest", min))
    ]
    write_markdown([title, "", *markdown_table(COLUMNS, table)], out)


if __name__ == "__main__":
    typer.run(main)
