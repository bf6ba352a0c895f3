"""What the commands' options ask for: classes by number or prompts by line, and the scale of guidance."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DModel

from engines import EngineFile
from gaq_export import drawing, texts
from gaq_export.conditions import LABELS, Conditions, classes
from gaq_export.denoiser import class_rows
from gaq_export.errors import GaqError
from gaq_export.models import LoadedModel
from gaq_export.schedule import under_guidance


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Options as they were given, None for each that was not.

    Attributes:
        classes: "all", or numbers and ranges of them, as in 0-4,7.
        prompts: file with one a line.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    classes: str | None = None
    prompts: Path | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise GaqError(f"Found a guidance of {self.guidance}; give a number, such as 3.0, or 1 for none.")

    @property
    def options(self) -> list[str]:
        """What was given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


def tell(model: LoadedModel, asked: Asked = Asked()) -> LoadedModel:
    """Return the model with conditions: those asked for, or all classes with the guidance of the model table.

    Its sampler becomes one that guidance suits, see `schedule.under_guidance`.

    Args:
        model: a model of `load_model`; one that has its conditions, or is told nothing, is returned as it is.
        asked: what to draw.

    Raises:
        GaqError: what was asked for is not what the network is told, or it needs prompts and there are none.
    """
    if model.conditions is not None:
        return model
    _refuse_other(asked, f"The network of {model.spec.name!r}", set(model.told))
    if not model.told:
        return model
    scale = model.spec.guidance if asked.guidance is None else asked.guidance
    rows = class_rows(model.unet)
    if rows is not None and set(model.told) == {LABELS}:
        # Only of a plain U-Net one cannot know that its last class stands for nothing, unless guidance is asked for.
        spare = scale != 1 or model.spec.guidance != 1 or not isinstance(model.unet, UNet2DModel)
        count, nothing = (rows - 1, rows - 1) if spare else (rows, None)
        told = classes(parse_classes(asked.classes or "all", count), nothing=nothing, guidance=scale)
    elif asked.prompts is None:
        raise GaqError(f"{model.spec.name!r} draws what a text says: give --prompts FILE, one a line.")
    else:
        told = texts.told(model, read_prompts(asked.prompts), scale)
    sampler = under_guidance(model.spec.sampler, model.schedule, scale)
    return replace(model, conditions=told, spec=replace(model.spec, sampler=sampler))


def retell(file: EngineFile, asked: Asked) -> Conditions | None:
    """Return what to draw with an engine: what its file says, with what was asked for put in; None if nothing was.

    Raises:
        GaqError: it is not what the network is told, or the engine has no guidance and some was asked for.
    """
    own = drawing.told_by(file)
    _refuse_other(asked, str(file.path), set() if own is None else set(own.rows))
    if own is None or not asked.options:
        return None
    scale = own.guidance if asked.guidance is None else asked.guidance
    if scale != 1 and not own.guided and (file.about["graph"] == "step" or not own.instead):
        raise GaqError(f"{file.path} has no guidance: calibrate with --guidance {scale:g}, and build again.")
    if asked.prompts is not None:
        prompts = read_prompts(asked.prompts)
        with drawing.open_texts(file) as found:
            return texts.told(found, prompts, scale)
    if asked.classes is None:
        return replace(own, guidance=scale)
    nothing = int(own.instead[LABELS]) if own.instead else None
    chosen = parse_classes(asked.classes, file.about["model"]["classes"] if nothing is None else nothing)
    return classes(chosen, nothing=nothing, guidance=scale)


def parse_classes(text: str, count: int) -> list[int]:
    """Read "all", "0-9" or "3,7-9" of `count` classes.

    >>> parse_classes("3,7-9", 10)
    [3, 7, 8, 9]
    """
    if text.strip() == "all":
        return list(range(count))
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        found = [number for first, *last in ends for number in range(first, (last[0] if last else first) + 1)]
    except ValueError:
        found = []
    if not found or not 0 <= min(found) <= max(found) < count:
        raise GaqError(f"Found classes {text!r}; write all, or numbers of 0 to {count - 1}, as in 3,7 or 0-9.")
    return found


def read_prompts(file: Path) -> list[str]:
    """Read prompts, one a line; raise GaqError if there are none."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise GaqError(f"Cannot read the prompts {file}: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise GaqError(f"{file} holds no prompts: write one a line.")
    return prompts


def _refuse_other(asked: Asked, who: str, told: set[str]) -> None:
    """Raise GaqError if something was asked for that a network is not told."""
    if not told and asked.options:
        raise GaqError(f"{who} is told nothing: leave out {', '.join(asked.options)}.")
    if asked.classes is not None and told != {LABELS}:
        raise GaqError(f"{who} is told texts, not classes: give --prompts FILE in place of --classes.")
    if asked.prompts is not None and texts.STATES not in told:
        raise GaqError(f"{who} is told classes, not texts: give --classes in place of --prompts.")
