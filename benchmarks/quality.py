"""What do other tools make of the same float network? Quality side by side with ours, on one yardstick.

    python benchmarks/quality.py --folder bench-quality --data mnist.npz --out docs/results/quality-ddpm-mnist.md

Everyone quantizes weights by channel and is given the same calibration images: ours takes what its preset does of their
samples, a peer SAMPLES of them, drawn from all steps. Each peer has two rows: as it comes, and with the
layers float that ours leaves float. A peer that is not installed is left out, and the page says so; finished rows are
stored, so peers may be installed in several environments, one run each.
"""

import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import peers
from calib.choices import Convention
from calib.files import write_atomically
from calib.float_layers import float_reasons
from calib.sqnr import ratio_db
from calib.trace import trace
from command import write_markdown
from engines import EngineConfig, open_engine
from gaq_export.comparison import yardstick
from gaq_export.comparison.yardstick import Yardstick
from gaq_export.diffusion.denoiser import Denoiser, engine_denoiser
from gaq_export.models.loader import LoadedModel, load_model
from gaq_export.pipeline import build_engine, calibrate
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.quantize.trajectories import collect
from gaq_export.report.markdown import machine, markdown_table
from gaq_export.run import Run
from options import ModelName, Out, ReportOnly

BATCH = 16  # samples that a peer is given at a time
SAMPLES = 320  # of them
WIDTHS = (8, 4)
HEAD = ("tool", "float layers", "SQNR dB, mean", "worst step", "run by")
PICTURES = ("PSNR dB, median", "Frechet distance")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A tool: the package it needs, the weight widths it has, who computes what it makes, and how to ask it."""

    package: str
    widths: tuple[int, ...]
    run_by: str
    make: Callable[[peers.Order], peers.Denoise]


PEERS = {
    "ONNX Runtime quantize_static": Peer(
        package="onnxruntime", widths=(8, 4), run_by="ONNX Runtime", make=peers.onnxruntime_static
    ),
    "OpenVINO NNCF": Peer(package="nncf", widths=(8,), run_by="OpenVINO", make=peers.openvino_nncf),
    "NVIDIA ModelOpt": Peer(package="modelopt", widths=(8, 4), run_by="PyTorch, simulated", make=peers.nvidia_modelopt),
    "AIMET AdaRound": Peer(
        package="aimet_onnx", widths=(8, 4), run_by="ONNX Runtime, simulated", make=peers.aimet_adaround
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The float model, what it is calibrated with, and where everything is stored."""

    model: LoadedModel
    schedule: str
    yardstick: Yardstick
    iterations: int

    @property
    def folder(self) -> Path:
        """Of everything."""
        return self.yardstick.folder

    def row(self, who: str, wbits: int, *, kept: bool) -> Path:
        """Return where a row is stored."""
        return self.folder / "rows" / f"{who.replace(' ', '-').lower()}-w{wbits}{'-kept' if kept else ''}.json"


def main(
    data: Annotated[Path, typer.Option(help=".npz of real images.")],
    model: ModelName = "ddpm-mnist",
    schedule: Annotated[str, typer.Option("--preset")] = "fast",
    folder: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("bench-quality"),
    images: Annotated[int, typer.Option(help="Images each network draws; 0 leaves images out.")] = 64,
    iterations: Annotated[int, typer.Option(help="AIMET's, a layer.")] = 1000,
    report_only: ReportOnly = False,
    out: Out = None,
) -> None:
    """Measure every row that is missing, and write one table for each width."""
    loaded = load_model(model)
    shared = Yardstick(model=loaded, folder=folder, images=images, data=data)
    bench = Bench(model=loaded, schedule=schedule, yardstick=shared, iterations=iterations)
    if not report_only:
        yardstick.prepare(shared)
        for wbits in WIDTHS:
            _ours(bench, wbits)
            for name, peer in PEERS.items():
                if wbits in peer.widths and importlib.util.find_spec(peer.package):
                    _theirs(bench, name, peer, wbits)
    write_markdown(_page(bench), out)


def _ours(bench: Bench, wbits: int) -> None:
    """Calibrate and build as a user would, and measure the engine."""
    path, run = bench.row("ours", wbits, kept=True), _run(bench, wbits)
    if path.exists():
        return
    plan = calibrate(bench.model, preset(bench.schedule, CalibrationOptions(wbits=wbits)), folder=run.folder)
    config = EngineConfig(backend="openvino", batch=(1, BATCH, BATCH))
    built = build_engine(folder=run.folder, out=run.folder / "unet.plan", config=config, graph="eps", model=bench.model)
    with open_engine(built.file) as engine:
        _measure(bench, path, engine_denoiser(engine), len(plan.float_layers))


def _theirs(bench: Bench, name: str, peer: Peer, wbits: int) -> None:
    """Ask a peer twice, as it comes and with our float layers, and measure what it gives."""
    own = float_reasons(
        trace(bench.model.network, bench.model.shape, bench.model.schedule.num_train), Convention.DEPLOY
    )
    for kept in (frozenset[str](), frozenset(own)):
        path = bench.row(name, wbits, kept=bool(kept))
        if path.exists():
            continue
        scratch = bench.folder / "peers" / path.stem
        scratch.mkdir(parents=True, exist_ok=True)
        order = peers.Order(
            network=bench.model.network,
            graph=bench.folder / "float.onnx",
            folder=scratch,
            samples=_samples(bench),
            wbits=wbits,
            kept=kept,
            iterations=bench.iterations,
        )
        _measure(bench, path, peer.make(order), len(kept))


def _run(bench: Bench, wbits: int) -> Run:
    return Run(folder=bench.folder / f"run-w{wbits}")


def _samples(bench: Bench) -> list[peers.Arrays]:
    """Return some of what our calibration learns from, in batches that hold samples of several steps."""
    spec, chosen = bench.model.spec.sampler, preset(bench.schedule)
    folder = _run(bench, WIDTHS[0]).calibration
    data = collect(bench.model, spec, images=chosen.images, seed=chosen.config.seed, folder=folder)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    return [{"x": data.x[i].numpy(), "t": data.t[i].numpy()} for i in torch.split(order, BATCH)]


def _measure(bench: Bench, path: Path, denoise: Denoiser, kept: int) -> None:
    shared = bench.yardstick
    with torch.no_grad():
        row: dict[str, Any] = {"error": yardstick.noise_errors(shared, denoise), "kept": kept}
        if shared.images:
            row |= yardstick.image_scores(shared, yardstick.draw_images(shared, denoise))
    write_atomically(path, json.dumps(row, indent=1).encode())
    print(path.stem, flush=True)


def _page(bench: Bench) -> Iterator[str]:
    facts, chosen, images = yardstick.facts(bench.yardstick), preset(bench.schedule), bench.yardstick.images
    yield f"# {bench.model.spec.name}: quality beside other tools"
    yield ""
    steps = bench.model.spec.sampler.steps
    method = (
        f"{chosen.images} calibration images for everyone, each a sample at {steps} steps, of which a peer is given "
        f"{SAMPLES} and ours takes what its preset does. 8-bit activations, weights by channel. SQNR of the predicted "
        f"noise on {yardstick.HELD_OUT} held-out "
        f"trajectories. AIMET learns {bench.iterations} iterations a layer, ours "
        f"{chosen.config.reconstruction.iterations} a block. {machine()}."
    )
    if images and facts.frechet is not None:
        floor = facts.frechet.drawn["other"].fd_real
        method += (
            f" PSNR is of {images} images from the same noise; the Frechet distance is to real images, by a digit "
            f"classifier, where the float network's from other noise is {floor:.2f}."
        )
    yield method
    for wbits in WIDTHS:
        rows = list(_rows(bench, wbits, facts.signal))
        yield from (
            "",
            f"## W{wbits}A8",
            "",
            *markdown_table((*HEAD[:-1], *(PICTURES if images else ()), HEAD[-1]), rows),
        )
    absent = [
        f"{name} W{wbits}, {'our float layers' if kept else 'as it comes'}"
        for wbits in WIDTHS
        for name, peer in PEERS.items()
        for kept in (False, True)
        if wbits in peer.widths and not bench.row(name, wbits, kept=kept).exists()
    ]
    if absent:
        yield from ("", f"Not measured: {'; '.join(absent)}.")


def _rows(bench: Bench, wbits: int, signal: Sequence[float]) -> Iterator[tuple[str, ...]]:
    names = [("ours", "OpenVINO", True)]
    names += [(name, peer.run_by, kept) for name, peer in PEERS.items() for kept in (False, True)]
    for name, run_by, kept in names:
        path = bench.row(name, wbits, kept=kept)
        if not path.exists():
            continue
        row = json.loads(path.read_text(encoding="utf-8"))
        decibels = list(map(ratio_db, signal, row["error"]))
        pictures = (f"{statistics.median(row['psnr_db']):.2f}", f"{row['fd_real']:.2f}") if "psnr_db" in row else ()
        yield (
            name,
            f"{row['kept']}" if kept else "its own choice",
            f"{statistics.fmean(decibels):.2f}",
            f"{min(decibels):.2f}",
            *pictures,
            run_by,
        )


if __name__ == "__main__":
    typer.run(main)
