"""Does every architecture work from end to end: calibrated, exported, run by OpenVINO, built by TensorRT-RTX?

    python benchmarks/architectures.py --out docs/results/architectures.md

Each has random weights and a small width, and otherwise its real blocks, levels, inputs, guidance and noise schedule.
Untrained residual branches end in zeros; here they get a tenth of the usual random weights, because in a network of
identities a single value on the edge of a code would decide about all others. Conditioning is random too: noise for
texts.
OpenVINO runs the network alone, TensorRT-RTX builds whole denoising steps with guidance inside. Results gather in the
folder, and finished ones are not measured again.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from command import command_line, one_line_errors, write_markdown
from engines import EngineConfig
from engines.machine import versions
from gaq_export import pipeline
from gaq_export.diffusion.conditioning import LABELS, Conditioning, class_conditioning
from gaq_export.models.diffusers_folder import fingerprint
from gaq_export.models.loader import LoadedModel, ModelSpec, random_model
from gaq_export.models.registry import MODELS, reduced
from gaq_export.quantize.presets import CalibrationOptions
from gaq_export.report.markdown import machine, markdown_table
from options import Folder, Out

STEPS, TEXTS = 4, 3
RUNTIMES = ("openvino", "tensorrt_rtx_cu13_bindings")
ENGINES = {
    "openvino": ("eps", EngineConfig(backend="openvino", threads=1)),
    "tensorrt-rtx": ("step", EngineConfig(backend="tensorrt-rtx")),
}
NAMES = (
    "ddpm-mnist",
    "ddpm-cifar10",
    "ldm-celebahq-256",
    "imagenet-ldm",
    "sd15",
    "sdxl",
    "dit-xl-2-256",
    "ddpm-mnist-labels",
)
ENDS, SHARE = ("conv2", "to_out.0", "net.2", "proj_out"), 0.1  # last layers of residual branches, and what they keep
COLUMNS = ("model", "network", "conditioning", "blocks", "quantized", "float", "OpenVINO, dB", "RTX, INT8 of quantized")


def conditioning(model: LoadedModel) -> Conditioning | None:
    """Return the conditioning: the first classes, with the last as unconditional, or noise in place of texts."""
    config = model.spec.config
    if LABELS in model.condition_inputs:  # diffusion transformers do not count the unconditional one
        count = config.get("num_class_embeds") or config.get("classes") or config["num_embeds_ada_norm"] + 1
        return class_conditioning(range(TEXTS), unconditional=count - 1, guidance=model.spec.guidance)
    if not model.condition_inputs:
        return None
    drawn = torch.Generator().manual_seed(0)
    return Conditioning(
        names=tuple(f"text {k}" for k in range(TEXTS)),
        rows={
            name: torch.randn(TEXTS, *row.shape[1:], generator=drawn) for name, row in model.condition_inputs.items()
        },
        unconditional={name: torch.zeros_like(row) for name, row in model.condition_inputs.items()},
        guidance=model.spec.guidance,
    )


def started(spec: ModelSpec) -> LoadedModel:
    """Return a model with random weights, near those that its training would start from."""
    model = random_model(spec)
    for name, layer in model.module.named_modules():
        if name.endswith(ENDS) and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(SHARE)
    return replace(model, fingerprint=fingerprint(model.module))


def measure(spec: ModelSpec, folder: Path) -> dict[str, Any]:
    """Take one architecture all the way and return what a row says."""
    model = started(replace(spec, sampler=replace(spec.sampler, steps=STEPS)))
    model = replace(model, conditioning=conditioning(model))
    plan = pipeline.calibrate(model, pipeline.preset("tiny", CalibrationOptions(per_step=True)), folder=folder / "run")
    result: dict[str, Any] = {
        "network": f"{type(model.module).__name__}, {sum(p.numel() for p in model.module.parameters()) / 1e6:.2f} M",
        "conditioning": sorted(model.condition_inputs),
        "guidance": model.conditioning.guidance if model.conditioning else 1.0,
        "blocks": sum(block.loss_before is not None for block in plan.blocks),
        "quantized": len(plan.layers),
        "float": dict(Counter(plan.float_layers.values())),
    }
    for backend, (graph, config) in ENGINES.items():
        out = folder / f"{backend}.plan"
        built = pipeline.build_engine(folder=folder / "run", out=out, config=config, graph=graph, model=model)
        inside = Counter(kernel.precision for kernel in built.file.audit.kernels)
        pairs = zip(built.parity.sqnr_db, built.parity.resolution_db, strict=True) if built.parity else []
        result[backend] = {"parity": min(pairs, default=None), "kernels": dict(inside)}
    return result


def line(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table."""
    rest = sum(result["float"].values())
    return (
        name,
        result["network"],
        ", ".join(result["conditioning"]) + (f", guidance {result['guidance']:g}" if result["conditioning"] else "")
        or "none",
        str(result["blocks"]),
        str(result["quantized"]),
        str(rest),
        "{:.1f} ({:.1f})".format(*result["openvino"]["parity"]),
        f"{result['tensorrt-rtx']['kernels'].get('int8', 0)} of {result['quantized']}",
    )


def main(
    folder: Folder = Path("architectures"),
    only: Annotated[str | None, typer.Option(help="Models, with commas between; all if not given.")] = None,
    out: Out = None,
) -> None:
    """Go all the way with each architecture, and write the table."""
    results = {}
    chosen = NAMES if only is None else only.split(",")
    with one_line_errors():
        for name in NAMES:
            path = folder / name / "result.json"
            if name in chosen and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(measure(reduced(MODELS[name]), path.parent)), encoding="utf-8")
            if path.exists():
                results[name] = json.loads(path.read_text(encoding="utf-8"))
        write_markdown(page(results), out)


def page(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the page."""
    reasons: Counter[str] = Counter()
    for result in results.values():
        reasons.update(result["float"])
    missing = [name for name in NAMES if name not in results]
    made_with = ", ".join(f"{name} {number}" for name, number in versions(RUNTIMES).items())
    return [
        "# Every architecture, all the way",
        "",
        f"`{command_line()}` on {machine()}; {made_with}.",
        "",
        "Random weights at reduced width, residual branches small as where training starts; preset tiny, W4A8,",
        "activation grids of each step's own. Parity is the SQNR of the predicted noise, OpenVINO's engine of the",
        f"network against fake-quantized PyTorch, at the worst of {STEPS} sampling steps; in brackets that of",
        "fake-quantized PyTorch against itself with inputs of layers that differ by a millionth. TensorRT-RTX only",
        "built, an engine of whole steps with guidance inside, on a machine without a GPU: its own layer list says",
        "what multiplies INT8 by INT8. ldm-bedrooms is the network of ldm-celebahq-256.",
        "",
        *markdown_table(COLUMNS, [line(name, result) for name, result in results.items()]),
        "",
        *([f"Not run yet: {', '.join(missing)}; the same command does these.", ""] if missing else []),
        "What stays float, over all of them:",
        "",
        *markdown_table(("why", "layers"), [(why, str(count)) for why, count in reasons.most_common()]),
    ]


if __name__ == "__main__":
    typer.run(main)
