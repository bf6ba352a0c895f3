"""Train one of the known architectures on your images; the result is a folder that `--weights` accepts.

    python examples/train_ddpm.py --images mnist.npz --arch ddpm-mnist --out my-model --minutes 85
    gaq-export calibrate --weights my-model

In: an .npz or .npy file of uint8 images, (N, H, W) or (N, H, W, C), or a folder of PNG and JPEG files. Smaller images
are padded with black to the architecture's size. Out: the EMA weights and their configs, `samples.png`, and
`state.safetensors`, from which the same command continues when it is run again.

With `--labels` the network is conditioned on the labels in the .npz. One class more, the last, is the unconditional
one: a tenth of the images get it in place of their label, so that guidance can be used (Ho and Salimans 2022). `--start
ddpm-mnist` begins with another model's weights, where the shapes agree.

The recipe is that of Ho et al. 2020 with today's habits: mean square error of the predicted noise, AdamW, a linear
warm-up (300 steps, or a tenth of the run if that is shorter), a cosine to 3 % of the peak rate, gradients clipped at 1,
bf16 autocast, and an exponential moving average whose decay rises at first.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gaq_export.diffusion import loop
from gaq_export.diffusion.conditioning import class_conditioning
from gaq_export.diffusion.loop import Sampling
from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, under_guidance
from gaq_export.errors import GaqError
from gaq_export.images import save_grid
from gaq_export.models import diffusers_folder
from gaq_export.models.architectures import as_denoiser
from gaq_export.models.loader import MODELS, ModelSpec, load_model
from gaq_export.models.scheduler_config import schedule_from_scheduler_config

WARM_UP, FLOOR, EMA_DECAY, CLIP_NORM = 300, 0.03, 0.9995, 1.0
UNCONDITIONAL_SHARE = 0.1  # of the images
CLASS_RATE = 10.0  # times the learning rate of the rest
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; `steps` or `minutes` end a run, whichever comes first."""

    steps: int | None
    minutes: float | None
    batch: int
    lr: float
    seed: int
    device: str
    bf16: bool
    start: str | None


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images, (N, C, H, W) uint8, and their labels, (N,) int64, if any; `unconditional` is the label for no class."""

    images: Tensor
    labels: Tensor | None = None
    unconditional: int | None = None


def main(
    images: Annotated[Path, typer.Option(help=".npz or .npy of uint8 images, or a folder of PNG and JPEG files.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an unfinished run in it is continued.")],
    arch: Annotated[str, typer.Option(help=f"Architecture: {', '.join(MODELS)}.")] = "ddpm-mnist",
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after this long.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after this many steps in all.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 64,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and noise.")] = 0,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast; slower on processors without it.")] = True,
    labels: Annotated[bool, typer.Option("--labels", help="Condition the network on the labels in the .npz.")] = False,
    start: Annotated[str | None, typer.Option(help="Name or folder of a model to start from.")] = None,
) -> None:
    """Train a diffusion model that gaq-export can quantize."""
    if arch not in MODELS:
        raise typer.BadParameter(f"unknown architecture {arch!r}; choose one of {list(MODELS)}", param_hint="--arch")
    if steps is None and minutes is None:
        raise typer.BadParameter("say how long to train: --minutes or --steps", param_hint="--minutes")
    spec = MODELS[arch]
    try:
        data = load_data(images, spec, labels=labels)
        if data.unconditional is not None:
            spec = replace(spec, config={**spec.config, "num_class_embeds": data.unconditional + 1})
        settings = Settings(
            steps=steps, minutes=minutes, batch=batch, lr=lr, seed=seed, device=device, bf16=bf16, start=start
        )
        train(spec, data, out, settings)
    except GaqError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def load_data(path: Path, spec: ModelSpec, *, labels: bool) -> Data:
    """Read images, and labels if wanted; raise GaqError if either is missing or does not fit the architecture."""
    images = load_images(path, int(spec.config["in_channels"]), int(spec.config["sample_size"]))
    if not labels:
        return Data(images=images)
    if path.suffix != ".npz":
        raise GaqError(f"Found {path}; labels are read from an .npz that holds them beside the images.")
    classes = torch.from_numpy(_load_array(path, "label").astype(np.int64))
    if classes.shape != images.shape[:1] or int(classes.min()) < 0:
        raise GaqError(f"Found labels of shape {tuple(classes.shape)} in {path}; expected {len(images)}, from 0 up.")
    return Data(images=images, labels=classes, unconditional=int(classes.max()) + 1)


def load_images(path: Path, channels: int, size: int) -> Tensor:
    """Return images as (N, C, H, W) uint8, padded with black to `size`.

    Args:
        path: .npz (its first array of images, one named "train" if there is one), .npy, or a folder.
        channels: 1 or 3.
        size: Height and width the architecture needs.

    Raises:
        GaqError: there are no images, or they are larger than `size` or of another type.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not files:
            raise GaqError(f"The folder {path} holds no PNG or JPEG files.")
        pictures = [np.asarray(Image.open(file).convert("L" if channels == 1 else "RGB")) for file in files]
        if len({picture.shape for picture in pictures}) > 1:
            raise GaqError(f"The images in {path} have different sizes; scale them to {size}x{size} first.")
        array = np.stack(pictures)
    else:
        array = _load_array(path, "image")
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != channels or max(array.shape[1:3]) > size:
        raise GaqError(
            f"Expected uint8 images of at most {size}x{size} with {channels} channels; found {array.dtype} of shape "
            f"{array.shape} in {path}."
        )
    down, right = size - array.shape[1], size - array.shape[2]
    padding = ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    return torch.from_numpy(np.pad(array, padding)).permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)


def _load_array(path: Path, kind: str) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GaqError(f"The file {path} cannot be read as .npz or .npy: {error}") from error
    if isinstance(loaded, np.ndarray):
        return loaded
    names = sorted((name for name in loaded.files if kind in name), key=lambda name: "train" not in name)
    if not names:
        raise GaqError(f"{path} has no array with {kind!r} in its name; it holds {loaded.files}.")
    array: np.ndarray = loaded[names[0]]
    return array


def train(spec: ModelSpec, data: Data, out: Path, settings: Settings) -> None:
    """Train for the steps or the minutes of `settings`, then write the model folder.

    Args:
        spec: Architecture and scheduler.
        data: Images, with labels if the architecture has classes.
        out: Folder to write.
        settings: How long and how.
    """
    schedule = schedule_from_scheduler_config(spec.scheduler)
    torch.manual_seed(settings.seed)
    unet = diffusers_folder.build_network(spec.config, spec.name)
    if settings.start is not None:
        _begin_with(unet, settings.start)
    unet = unet.to(settings.device).train()
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(_groups(unet), lr=settings.lr, weight_decay=1e-4)
    out.mkdir(parents=True, exist_ok=True)
    done, elapsed = _resume(out / STATE, unet, ema, optimizer)
    started, last_saved, running = time.monotonic() - elapsed, time.monotonic(), math.nan
    for step, share in _clock(done, started, settings):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["times"] * _rate(step, share)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        loss = noise_loss(unet, data, schedule, settings, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
        optimizer.step()
        _average(ema, unet, min(EMA_DECAY, (step + 1) / (step + 10)))
        now = loss.item()
        running = now if math.isnan(running) else 0.99 * running + 0.01 * now
        done = step + 1
        if done % 100 == 0:
            typer.echo(f"step {done}  loss {running:.4f}  {(time.monotonic() - started) / 60:.1f} min")
        if time.monotonic() - last_saved > 300:
            _save_state(out / STATE, unet, ema, optimizer, done, time.monotonic() - started)
            last_saved = time.monotonic()
    _save_state(out / STATE, unet, ema, optimizer, done, time.monotonic() - started)
    _write_model(out, spec, unet, ema, schedule)
    typer.echo(f"{done} steps, running loss {running:.4f}. Model and samples.png are in {out}")


def _groups(unet: UNet2DModel) -> list[dict[str, Any]]:
    """Return the parameters; the class embedding learns faster, since few images of a batch are of any one class."""
    table = [] if unet.class_embedding is None else list(unet.class_embedding.parameters())
    known = {id(value) for value in table}
    rest = [value for value in unet.parameters() if id(value) not in known]
    return [{"params": rest, "times": 1.0}, *({"params": [value], "times": CLASS_RATE} for value in table)]


def _rate(step: int, share: float) -> float:
    """Return the share of the peak learning rate at a step: a warm-up, then a cosine."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
    return min(max((step + 1) / WARM_UP, 10 * share), cosine)


def noise_loss(
    unet: UNet2DModel, data: Data, schedule: NoiseSchedule, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Return the mean square error of the predicted noise (Ho et al. 2020, equation 14) on one random batch."""
    rows = torch.randint(len(data.images), (settings.batch,), generator=generator)
    clean = (data.images[rows].float() / 127.5 - 1).to(settings.device)
    noise = torch.randn(clean.shape, generator=generator).to(settings.device)
    t = torch.randint(schedule.num_train, (settings.batch,), generator=generator)
    conditioning = None
    if data.labels is not None and data.unconditional is not None:
        dropped = torch.rand(len(rows), generator=generator) < UNCONDITIONAL_SHARE
        conditioning = data.labels[rows].masked_fill(dropped, data.unconditional).to(settings.device)
    a = schedule.alpha_bar[t].float().view(-1, 1, 1, 1).to(settings.device)
    with torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16, enabled=settings.bf16):
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        predicted = unet(noisy, t.to(settings.device), class_labels=conditioning, return_dict=False)[0]
    return nn.functional.mse_loss(predicted.float(), noise)


def _clock(done: int, started: float, settings: Settings) -> Iterator[tuple[int, float]]:
    """Yield each step with the share of the run that is done."""
    step = done
    while True:
        shares = [0.0]
        if settings.steps is not None:
            shares.append(step / settings.steps)
        if settings.minutes is not None:
            shares.append((time.monotonic() - started) / 60 / settings.minutes if settings.minutes else 1.0)
        if max(shares) >= 1:
            return
        yield step, max(shares)
        step += 1


def _begin_with(unet: UNet2DModel, start: str) -> None:
    """Copy another network's weights where the shapes agree."""
    folder = Path(start)
    other = load_model(weights=folder) if folder.is_dir() else load_model(start)
    state = unet.state_dict()
    fitting = {n: v for n, v in other.module.state_dict().items() if n in state and state[n].shape == v.shape}
    if not fitting:
        raise GaqError(f"No weight of {start} fits the architecture; train it from the beginning, without --start.")
    unet.load_state_dict(fitting, strict=False)
    if unet.class_embedding is not None and "class_embedding.weight" not in fitting:
        nn.init.zeros_(unet.class_embedding.weight)  # so that at first it predicts what the other network does
    typer.echo(f"{len(fitting)} of {len(state)} tensors start from {start}")


def _average(ema: dict[str, Tensor], unet: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for name, value in unet.state_dict().items():
            ema[name].lerp_(value, 1 - decay)


def _save_state(
    path: Path,
    unet: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed: float,
) -> None:
    tensors = {f"unet/{name}": value for name, value in unet.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{name}": value for name, value in moments.items()}
    progress = {"step": str(step), "elapsed_s": str(elapsed)}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=progress)
    os.replace(temporary, path)


def _resume(path: Path, unet: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load the state of an earlier run if there is one; return its number of steps and its seconds."""
    if not path.exists():
        return 0, 0.0
    tensors = load_file(path)
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    try:
        unet.load_state_dict({n.removeprefix("unet/"): v for n, v in tensors.items() if n.startswith("unet/")})
    except RuntimeError as error:
        raise GaqError(f"{path} belongs to another architecture; choose another --out or delete it.") from error
    for name in ema:
        ema[name].copy_(tensors[f"ema/{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "adam":
            index, _, moment = rest.partition("/")
            moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    progress = header["__metadata__"]
    return int(progress["step"]), float(progress["elapsed_s"])


def _write_model(
    out: Path, spec: ModelSpec, unet: UNet2DModel, ema: dict[str, Tensor], schedule: NoiseSchedule
) -> None:
    unet.load_state_dict(ema)
    unet.cpu().eval().save_pretrained(out)
    (out / "scheduler_config.json").write_text(json.dumps(dict(spec.scheduler), indent=2) + "\n", encoding="utf-8")
    size = int(spec.config["sample_size"])
    shape = (int(spec.config["in_channels"]), size, size)
    seeds = range(20)
    classes = spec.config["num_class_embeds"]  # the unconditional one included
    conditioning = None
    if classes is not None:
        conditioning = class_conditioning(range(classes - 1), unconditional=classes - 1, guidance=3.0)
    sampler = under_guidance(SamplerSpec(steps=20), schedule, 1.0 if conditioning is None else conditioning.guidance)
    sampling = Sampling(schedule=schedule, shape=shape, sampler=sampler, conditioning=conditioning)
    drawn = loop.run(as_denoiser(unet), seeds, sampling)
    save_grid(out / "samples.png", [("", drawn[:10]), ("", drawn[10:])])


if __name__ == "__main__":
    typer.run(main)
