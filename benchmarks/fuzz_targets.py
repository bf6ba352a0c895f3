"""What is damaged, and what is then done with it: each target is a file of ours or of a user's, and a way to read it.

`make_material` writes one of everything with a tiny network. An action reads it as a command would and returns a digest
of what it got, which tells whether a damaged file changed the result.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler, UNet2DModel
from typer.testing import CliRunner

import mutations
from calib.fakequant import fake_quantized
from calib.files import read_safetensors, write_safetensors
from calib.plan import load_plan
from gaq_export import pipeline
from gaq_export import run as runs
from gaq_export.cli.app import app
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.evaluation.evaluate import read_evaluation, write_evaluation
from gaq_export.evaluation.feature_extractors import Extractor
from gaq_export.evaluation.feature_metrics import Features
from gaq_export.evaluation.image_sets import open_images
from gaq_export.evaluation.scores import Score, features_of
from gaq_export.models.loader import load_model
from gaq_export.models.provenance import find_model, load_conditioning, provenance_of
from gaq_export.quantize.trajectories import collect
from gaq_export.quantize.verdict import judge
from gaq_export.run import Run
from gaq_export.sharing import pack
from mutations import Mutation

STEPS, IMAGES = 4, 4
Action = Callable[[Path], str]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Files of one kind, how they are damaged, and what reads them.

    Attributes:
        name: of the kind.
        files: a pattern inside the material.
        mutations: ways to damage one of them.
        act: reads it, in a folder with a copy of the material, and returns a digest of the result.
        ours: whether only this package writes such files; a damaged one must never change a result then. A user's own
            file may well be another valid one.
        weight: share of the variants.
    """

    name: str
    files: str
    mutations: tuple[Mutation, ...]
    act: Action
    ours: bool = True
    weight: float = 1.0


def make_material(folder: Path, size: int = 8) -> str:
    """Write one of everything into a folder, and return its name.

    A model, its run, engine, pictures, shards, features, evaluation and pack, and a user's images.

    Args:
        folder: an empty folder, in which this process then is.
        size: height and width of the images.
    """
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        norm_num_groups=4,
    )
    network.save_pretrained(folder / "model")
    network.save_pretrained(folder / "sharded", max_shard_size="8KB")
    for home in ("model", "sharded"):
        DDIMScheduler(num_train_timesteps=100, beta_end=0.2).save_pretrained(folder / home)
    model = load_model(weights=folder / "model").with_sampler(SamplerSpec(steps=STEPS))
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder / "run")
    judge(folder / "run", model)
    os.chdir(folder)
    command("build-engine", "--run", "run", "--backend", "openvino", "--threads", "1", "--batch", "1,2,2", "-q")
    command("sample", "--engine", "unet.plan", "--num", IMAGES, "--out", "pictures", "-q")
    command("sample", "--engine", "unet.plan", "--num", IMAGES, "--shard", 2, "--out", "shards", "-q")
    command("pack", "run", "--out", "pack", "--whole")
    _features(folder)
    (folder / "evaluation").mkdir()
    context = {"images": IMAGES, "engine_sha256": "0" * 64}
    score = Score(metric="psnr", name="PSNR", value=30.0, low=29.0, high=31.0, floor=None, context=context)
    write_evaluation(folder / "evaluation", {"unet": [score]}, {"unet": {"float trajectory": [30.0] * STEPS}})
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    (folder / "options.json").write_text('["models"]')
    np.savez(folder / "images.npz", train_images=pixels)
    return folder.name


def command(*words: object) -> str:
    """Run a command as a user would; raise GaqError with its one line if it refuses, and what it raised otherwise."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"GAQ_EXPORT_PRESET": "tiny"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == 0:
        return result.output
    lines = result.stderr.splitlines()
    # Usage errors are drawn in a box by the command line's library; everything else is one line.
    if result.exit_code == 2 and (len(lines) == 1 or "Usage:" in result.stderr):
        raise GaqError(lines[-1])
    raise RuntimeError(f"exit code {result.exit_code}, {len(lines)} lines: {lines[-3:]}")


def _plan(folder: Path) -> str:
    """Read the plan and run its network."""
    plan = load_plan(folder / "run" / "plan.safetensors")
    provenance = provenance_of(plan)
    model = find_model(provenance, load_model(weights=folder / "model"), folder / "run")
    load_conditioning(provenance, folder / "run")
    with torch.no_grad():
        out = fake_quantized(model.network, plan)(*_inputs(provenance.sampler.steps))
    return _sha(out.numpy().tobytes(), str(provenance.sampler), repr(plan.config))


def _plan_signed_again(folder: Path) -> str:
    """Read a plan whose JSON was changed and whose checksum was then made to fit."""
    path = folder / "run" / "plan.safetensors"
    header, tensors = read_safetensors(path)
    text = path.with_suffix(".json").read_bytes()
    write_safetensors(path, tensors, header | {"json_sha256": hashlib.sha256(text).hexdigest()})
    return _plan(folder)


def _run_record(folder: Path) -> str:
    """Do what the same command does again, and write the journal on."""
    model = load_model(weights=folder / "model").with_sampler(SamplerSpec(steps=STEPS))
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder / "run")
    runs.add_entry(Run(folder=folder / "run"), "fuzz")
    return _plan(folder) + repr(runs.read_record(Run(folder=folder / "run")).settings)


def _resumed(folder: Path) -> str:
    """Calibrate again from what is left of a calibration."""
    for name in ("plan.safetensors", "plan.json"):
        (folder / "run" / name).unlink()
    model = load_model(weights=folder / "model").with_sampler(SamplerSpec(steps=STEPS))
    pipeline.calibrate(model, pipeline.preset("tiny"), folder=folder / "run")
    return _plan(folder)


def _trajectories(folder: Path) -> str:
    model = load_model(weights=folder / "model")
    data = collect(model, SamplerSpec(steps=STEPS), images=4, folder=folder / "run" / "calibration")
    return _sha(*(tensor.numpy().tobytes() for tensor in data.tensors))


def _verdict(folder: Path) -> str:
    return repr(judge(folder / "run", load_model(weights=folder / "model")))


def _engine(folder: Path) -> str:
    """Draw with the engine."""
    command("sample", "--engine", "unet.plan", "--num", 2, "--out", "drawn", "-q")
    return _sha(*_pixels(folder / "drawn"))


def _shards(folder: Path) -> str:
    """Go on with a finished set of shards, then read them as `evaluate` does."""
    command("sample", "--engine", "unet.plan", "--num", IMAGES, "--shard", 2, "--out", "shards", "-q")
    return _sha(*_pixels(folder / "shards"))


def _shards_judged(folder: Path) -> str:
    return _sha(*_pixels(folder / "shards"))


def _pictures(folder: Path) -> str:
    return _sha(*_pixels(folder / "pictures"))


def _array(folder: Path) -> str:
    return _sha(*_pixels(folder / "images.npz"))


def _pixels(path: Path) -> Iterator[bytes]:
    images = open_images(path)
    yield repr((images.count, images.shape)).encode()
    for part in images.batches(2):
        yield part.numpy().tobytes()


def _features(folder: Path) -> str:
    """Read kept features of the shards; they are computed if there are none that can be used."""
    kept = features_of(open_images(folder / "shards"), PROBE, folder / "features")
    return _sha(kept.pooled.numpy().tobytes(), kept.logits.numpy().tobytes(), kept.spatial.numpy().tobytes())


def _means(images: torch.Tensor) -> Features:
    rows = images.float().flatten(1)[:, :4]
    return Features(pooled=rows, logits=rows + 1, spatial=rows + 2)


def _evaluation(folder: Path) -> str:
    return repr(read_evaluation(folder / "evaluation"))


def _pack(folder: Path) -> str:
    plan = pack.unpack(folder / "pack", Run(folder=folder / "unpacked"))
    name, source = pack.float_model(folder / "pack")
    model = load_model(name, source)
    with torch.no_grad():
        return _sha(fake_quantized(model.network, plan)(*_inputs(STEPS)).numpy().tobytes())


def _model(folder: Path, name: str = "model") -> str:
    """Load the model and call it once."""
    model = load_model(weights=folder / name)
    with torch.no_grad():
        return _sha(model.network(torch.zeros(1, *model.shape), torch.tensor([1])).numpy().tobytes())


def _option(file: Path, random: Random) -> str:
    """Write a command with one option that a user got wrong."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = random.choice(sorted(COMMANDS))
    options = [p for p in commands[name].params if p.opts[0].startswith("--") and not p.is_flag and not p.hidden]
    words = [*COMMANDS[name], random.choice(options).opts[0], random.choice(WRONG_WORDS)]
    file.write_text(json.dumps([name, *words]), encoding="utf-8")
    return " ".join([name, *words])


def _commanded(folder: Path) -> str:
    """Run the command; what is there already must be there afterwards."""
    before = _kept(folder)
    try:
        command(*json.loads((folder / "options.json").read_text(encoding="utf-8")))
    except GaqError:
        if _kept(folder) == before:
            raise
    return _kept(folder)


def _kept(folder: Path) -> str:
    return _sha(*(path.read_bytes() for pattern in KEPT for path in sorted(folder.glob(pattern)) if path.is_file()))


def _inputs(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([3, 50])


def _sha(*parts: bytes | str) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()


# Each works as it is; one more option is added.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "calibrate": ("--weights", "model", "--run", "other", "-q"),
    "build-engine": ("--run", "run", "--threads", "1", "-q"),
    "export": ("--run", "run"),
    "sample": ("--engine", "unet.plan", "--num", "2", "-q"),
    "evaluate": ("pictures", "pictures", "-q"),
    "inspect": ("run", "-q"),
    "report": ("run", "-q"),
    "pack": ("run",),
    "compare": ("--weights", "model", "-q"),
}
WRONG_WORDS = (
    *("-1", "-99999999999999999999", "99999999999999999999", "1e400", "nan", "inf", "-inf", "x", "", " ", "1-2-3"),
    *("0-99999999999", "9-0,1", "0x10", "1,,2", "1,2", "[]", "run/plan.safetensors", "run/run.json", "run", "."),
    *("unet.plan", "unet.plan.json", "model/config.json", "nowhere/at/all", "images.npz", "<b>&'"),
)
KEPT = ("model/*", "run/plan.*", "run/calibration/*", "run/blocks/*", "unet.plan*")
PROBE = Extractor(name="probe", distance="probe", sha256="0" * 64, channels=1, size=None, run=_means)
RAW, TREE, TENSORS = mutations.bytes_of, mutations.json_of, mutations.tensors_of
_JSON, _TENSORS = (TREE, TREE, TREE, RAW, mutations.missing), (TENSORS, TENSORS, RAW, mutations.missing)

TARGETS = (
    Target(name="an option", files="options.json", mutations=(_option,), act=_commanded, weight=4),
    Target(name="plan.json", files="run/plan.json", mutations=_JSON, act=_plan),
    Target(
        name="plan.json, checksum redone",
        files="run/plan.json",
        mutations=(TREE,),
        act=_plan_signed_again,
        ours=False,
        weight=3,
    ),
    Target(name="plan.safetensors", files="run/plan.safetensors", mutations=_TENSORS, act=_plan),
    Target(name="run.json", files="run/run.json", mutations=_JSON, act=_run_record),
    Target(name="calibration group", files="run/calibration/*.safetensors", mutations=_TENSORS, act=_trajectories),
    Target(name="finished block", files="run/blocks/*.safetensors", mutations=_TENSORS, act=_resumed),
    Target(name="verdict.json", files="run/verdict.json", mutations=_JSON, act=_verdict),
    Target(name="engine", files="unet.plan", mutations=(RAW, mutations.missing), act=_engine, weight=0.5),
    Target(name="engine record", files="unet.plan.json", mutations=_JSON, act=_engine, weight=2),
    Target(name="shard record, continued", files="shards/samples.json", mutations=_JSON, act=_shards),
    Target(name="shard, continued", files="shards/*.safetensors", mutations=_TENSORS, act=_shards),
    Target(name="shard record, judged", files="shards/samples.json", mutations=_JSON, act=_shards_judged),
    Target(name="shard, judged", files="shards/*.safetensors", mutations=_TENSORS, act=_shards_judged),
    Target(name="record of pictures", files="pictures/samples.json", mutations=_JSON, act=_pictures, ours=False),
    Target(name="picture", files="pictures/0*.png", mutations=(RAW, mutations.pictures_of), act=_pictures, ours=False),
    Target(name="kept features", files="features/*.safetensors", mutations=_TENSORS, act=_features),
    Target(name="evaluation.json", files="evaluation/evaluation.json", mutations=_JSON, act=_evaluation),
    Target(name="pack", files="pack/**/*.*", mutations=(RAW, mutations.missing), act=_pack),
    Target(name="pack record", files="pack/pack.json", mutations=_JSON, act=_pack),
    Target(
        name="images.npz", files="images.npz", mutations=(RAW, mutations.arrays_of), act=_array, ours=False, weight=2
    ),
    Target(name="model config", files="model/config.json", mutations=_JSON, act=_model, ours=False, weight=3),
    Target(
        name="scheduler config", files="model/scheduler_config.json", mutations=_JSON, act=_model, ours=False, weight=2
    ),
    Target(
        name="index of weights",
        files="sharded/*.index.json",
        mutations=_JSON,
        act=partial(_model, name="sharded"),
        ours=False,
    ),
    Target(name="model weights", files="model/*.safetensors", mutations=_TENSORS, act=_model, ours=False),
)
