"""The options that commands share, each written once, and errors that a user can cause, printed in one line."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calib import choices as settings
from calib.config import BITS
from gaq_export.cli.choices import GRAPHS, SAMPLERS, SPACINGS, either
from gaq_export.graph.profiles import PROFILES
from gaq_export.quantize.presets import PRESETS

if TYPE_CHECKING:
    from gaq_export.devices import Device
    from gaq_export.diffusion.schedule import SamplerSpec
    from gaq_export.models.loader import LoadedModel

DEFAULT_RUN = Path("gaq-run")

# What no one asks for: a slip of the finger is refused before anything is drawn or held in memory.
MOST_IMAGES = 10_000_000
MOST_WORKERS = 1024
MOST_BATCH = 65_536

_WIDTHS = f"{BITS[0]} to {BITS[-1]}"
_MODEL = "Model and what it draws"
_QUANTIZATION = "Quantization"
_SAMPLER = "Sampler"
_DRAWING = "Drawing"
_DEVICE = "Device"


def _option(help_text: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **settings)


RunFolder = Annotated[Path, _option("Run folder: the calibration's files, so that it can continue.", "--run")]
RunArgument = Annotated[Path, typer.Argument(help="Run folder of a finished calibration.")]
EvaluationFolder = Annotated[
    Path | None,
    _option("Folder that `evaluate` wrote. By default ./evaluation, if it is about this engine.", "--evaluation"),
]
Quiet = Annotated[bool, _option("Print only the result.", "--quiet", "-q")]

ModelName = Annotated[str | None, _option("Name of a model, see `gaq-export models`.", "--model", "-m", panel=_MODEL)]
ModelArgument = Annotated[str | None, typer.Argument(help="Name of a model, see `gaq-export models`.")]
Weights = Annotated[
    str | None,
    _option(
        "Folder in diffusers' layout, or a pack; or 'random', for trying size and speed (the images are meaningless).",
        panel=_MODEL,
    ),
]
Classes = Annotated[
    str | None,
    _option("Classes to draw: 3,7 or 0-9 or all. Of K classes the image of seed s gets number s mod K.", panel=_MODEL),
]
Prompts = Annotated[
    Path | None, _option("Text file of prompts to draw, one a line, taken in turn like classes.", panel=_MODEL)
]
Guidance = Annotated[
    float | None, _option("Scale of classifier-free guidance; 1 for none.", panel=_MODEL, min=-1000, max=1000)
]

WeightBits = Annotated[int, _option(f"Bits of a weight, {_WIDTHS}.", panel=_QUANTIZATION, min=BITS[0], max=BITS[-1])]
PresetName = Annotated[
    str,
    _option(
        f"How long to calibrate: {'; '.join(f'{name} ({row.description})' for name, row in PRESETS.items())}.",
        panel=_QUANTIZATION,
        envvar="GAQ_EXPORT_PRESET",
    ),
]
OmegaRule = Annotated[
    str | None,
    _option(
        f"How calibration samples are weighted: {either(settings.OmegaRule)}. By default gac, gradient alignment.",
        panel=_QUANTIZATION,
    ),
]
Convention = Annotated[
    str | None,
    _option(
        f"Which layers stay float: {either(settings.Convention)}. By default deploy: the first and last layer and the "
        "time embedding. tfmq follows the papers.",
        panel=_QUANTIZATION,
    ),
]
CorrectionRule = Annotated[
    str | None,
    _option(
        f"Which error of the predicted noise the sampler corrects: {either(settings.CorrectionRule)}. By default none.",
        panel=_QUANTIZATION,
    ),
]
Iterations = Annotated[
    int | None,
    _option(
        "Iterations for each block, in place of the preset's; 0 for rounding to nearest.",
        panel=_QUANTIZATION,
        min=0,
        max=10_000_000,
    ),
]
Trajectories = Annotated[
    int | None,
    _option("Trajectories to collect, in place of the preset's.", panel=_QUANTIZATION, min=1, max=1_000_000),
]

RequireDb = Annotated[
    float | None,
    _option(
        "Least quality against the float network, in dB; exit code 3 below it. What counts is the mean SQNR of the "
        "predicted noise or the predicted PSNR of the pictures, the lower of both.",
        "--require-db",
        min=0,
        max=200,
    ),
]

Steps = Annotated[
    int | None,
    _option(
        "Number of sampling steps, in place of the model's, calibration's or engine's.",
        panel=_SAMPLER,
        min=1,
        max=100_000,
    ),
]
SamplerName = Annotated[
    str | None, _option(f"Sampler, in place of the model's, calibration's or engine's: {SAMPLERS}.", panel=_SAMPLER)
]
Spacing = Annotated[
    str | None,
    _option(f"How the steps are spread over the timesteps: {SPACINGS}; from-2 and so on too.", panel=_SAMPLER),
]
Eta = Annotated[float | None, _option("Noise that DDIM adds in each step, 0 to 1.", panel=_SAMPLER, min=0, max=1)]
EngineDevice = Annotated[
    str, _option("GPU for engines of GPUs: cuda:N, counted from 0; the first by default.", "--device")
]
Workers = Annotated[
    int | None,
    _option(
        "Processes that draw, one thread each; by default as many as there are cores.",
        panel=_DRAWING,
        min=1,
        max=MOST_WORKERS,
    ),
]
Ray = Annotated[str | None, _option("Address of a Ray cluster whose workers draw instead, or local.", panel=_DRAWING)]
CellRay = Annotated[
    str | None,
    _option(
        "Address of a Ray cluster that calibrates with several recipes at a time, each on a GPU if it has some, else "
        "on one core; or local.",
        "--ray",
    ),
]

DeviceName = Annotated[
    str,
    _option(
        "Where PyTorch computes: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:N (counted from 0) "
        "or mps.",
        "--device",
        panel=_DEVICE,
        envvar="GAQ_EXPORT_DEVICE",
    ),
]
BothDevices = Annotated[
    str,
    _option(
        "Where PyTorch computes, and which GPU runs engines of GPUs: auto (a CUDA GPU if there is one, else the CPU), "
        "cpu, cuda, cuda:N (counted from 0) or mps.",
        "--device",
        panel=_DEVICE,
        envvar="GAQ_EXPORT_DEVICE",
    ),
]
Tf32 = Annotated[
    bool,
    _option("Let a CUDA GPU round products of float32 to TensorFloat-32: faster, less exact.", "--tf32", panel=_DEVICE),
]
CacheName = Annotated[
    str,
    _option(
        f"Where a calibration on a GPU puts its recordings: {either(settings.Cache)}. By default where there is room. "
        "No number depends on it.",
        "--cache",
        panel=_DEVICE,
    ),
]

GraphKind = Annotated[
    str,
    _option(f"{GRAPHS}: a whole denoising step of one sampler, or the network alone, for any sampler."),
]
Profile = Annotated[str, _option(f"Form of the Q/DQ nodes in the ONNX file: {either(PROFILES)}.")]

Block = Annotated[
    str | None,
    _option(
        "Block to measure closely. By default the one with the largest loss when its weights are rounded to nearest."
    ),
]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that a user can cause in one line and exit with code 2; all others show their traceback.

    So are memory or a disk that ran out. What `engines` warns of is printed in one line too, once.
    """
    from gaq_export.errors import used_up, user_errors, visible

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _note()
            yield
    # What was finished is in files by now: shards, blocks, cells.
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues where it was", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT, as shells have it
    except user_errors() as error:
        typer.echo(f"error: {visible(str(error)).strip()}", err=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError, OSError) as error:
        reason = used_up(error)
        # Names that are too long, links in a circle: what no command foresees is still the user's to mend.
        if reason is None and isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}. Choose another place."
        if reason is None:
            raise
        typer.echo(f"error: {visible(reason)}", err=True)
        raise typer.Exit(2) from None


def _note() -> Callable[..., None]:
    """Return what shows a warning: one of `engines` as a note, unless it did so before, others as Python does."""
    seen = set[str]()
    python = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **further: Any) -> None:
        from engines.errors import EngineWarning  # heavy, but whoever warned has imported much already

        if not issubclass(category, EngineWarning):
            python(message, category, *place, **further)
        elif str(message) not in seen:
            seen.add(str(message))
            typer.echo(f"note: {message}", err=True)

    return show


def replace_options(sampler: "SamplerSpec", **options: object) -> "SamplerSpec":
    """Return the sampler with those of its fields replaced whose option is not None."""
    from dataclasses import replace

    # None means that the option was not given; 0 is a value, as in --eta 0.
    fields: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not fields.get("name", "ddim").startswith("ddim"):
        fields.setdefault("eta", 0.0)  # another sampler was asked for, and eta is DDIM's
    return replace(sampler, **fields)


def drawn_with(model: "LoadedModel", **options: object) -> "LoadedModel":
    """Return the model with the sampler options that were given, and say if a sampler stands in for the config's.

    Args:
        model: whose sampler counts where an option is None.
        options: fields of the sampler, as for `replace_options`.
    """
    from dataclasses import replace

    changed = model.with_sampler(replace_options(model.spec.sampler, **options))
    if options.get("name") is None and model.instead:
        typer.echo(f"note: {replace(changed, instead=model.instead).sampler_note}", err=True)
    return changed


def device_of(name: str, tf32: bool, cache: str = "auto") -> "Device":
    """Return the device of --device, --tf32 and --cache.

    Raises:
        GaqError: an unknown name, or no such device here.
    """
    from gaq_export.deploy.record import parse_choice
    from gaq_export.devices import find_device

    return find_device(name, tf32=tf32, cache=parse_choice("cache", cache, settings.Cache))


def find_model(
    model: str | None,
    weights: str | None,
    classes: str | None = None,
    prompts: Path | None = None,
    guidance: float | None = None,
) -> "LoadedModel":
    """Return the model of a name, folder or pack, with its conditioning, and warn of random weights.

    Args:
        model: `--model`.
        weights: `--weights`.
        classes: `--classes`.
        prompts: `--prompts`.
        guidance: `--guidance`.

    Raises:
        GaqError: neither a name nor weights, an unknown name, weights that cannot be read, or a conditioning that the
            network does not take.
    """
    from gaq_export.errors import GaqError
    from gaq_export.models.conditioning_request import ConditioningRequest, condition_model
    from gaq_export.models.loader import load_model

    if model is None and weights is None:
        raise GaqError("Give the name of a model (see `gaq-export models`), or --weights FOLDER.")
    # The name of `pack.MARK`, written again here because that module takes seconds to import.
    if weights is not None and Path(weights, "pack.json").is_file():
        from gaq_export.sharing import pack

        name, weights = pack.float_model(Path(weights))
        model = model or name
    loaded = load_model(model, weights)
    warn_if_meaningless(loaded.random_weights)
    return condition_model(loaded, ConditioningRequest(classes=classes, prompts=prompts, guidance=guidance))


def warn_if_meaningless(meaningless: bool) -> None:
    """Write a note to stderr if the weights are random."""
    if meaningless:
        # To stderr, so that a script which reads the result is not disturbed.
        typer.echo("note: random weights, so the pictures are meaningless", err=True)
