"""What the commands' options ask for: classes by number or prompts by line, and the scale of guidance."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DModel

from engines import EngineFile
from gaq_export.deploy import session
from gaq_export.diffusion.conditioning import LABELS, Conditioning, class_conditioning
from gaq_export.diffusion.schedule import under_guidance
from gaq_export.errors import GaqError
from gaq_export.models import text_encoder
from gaq_export.models.architectures import class_rows
from gaq_export.models.loader import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ConditioningRequest:
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


def condition_model(model: LoadedModel, asked: ConditioningRequest = ConditioningRequest()) -> LoadedModel:
    """Return the model with conditions: those asked for, or all classes with the guidance of the model table.

    Its sampler becomes one that guidance suits, see `schedule.under_guidance`.

    Args:
        model: a model of `load_model`; one that has its conditions, or is told nothing, is returned as it is.
        asked: what to draw.

    Raises:
        GaqError: what was asked for is not what the network is told, or it needs prompts and there are none.
    """
    if model.conditioning is not None:
        return model
    _refuse_other(asked, f"The network of {model.spec.name!r}", set(model.condition_inputs))
    if not model.condition_inputs:
        return model
    scale = model.spec.guidance if asked.guidance is None else asked.guidance
    rows = class_rows(model.module)
    if rows is not None and set(model.condition_inputs) == {LABELS}:
        # Only of a plain U-Net one cannot know that its last class stands for nothing, unless guidance is asked for.
        spare = scale != 1 or model.spec.guidance != 1 or not isinstance(model.module, UNet2DModel)
        count, unconditional = (rows - 1, rows - 1) if spare else (rows, None)
        conditioning = class_conditioning(
            parse_classes(asked.classes or "all", count), unconditional=unconditional, guidance=scale
        )
    elif asked.prompts is None:
        raise GaqError(f"{model.spec.name!r} draws what a text says: give --prompts FILE, one a line.")
    else:
        conditioning = text_encoder.prompt_conditioning(model, read_prompts(asked.prompts), scale)
    sampler = under_guidance(model.spec.sampler, model.schedule, scale)
    return replace(model, conditioning=conditioning, spec=replace(model.spec, sampler=sampler))


def condition_engine(file: EngineFile, asked: ConditioningRequest) -> Conditioning | None:
    """Return what to draw with an engine: what its file says, with what was asked for put in; None if nothing was.

    Raises:
        GaqError: it is not what the network is told, or the engine has no guidance and some was asked for.
    """
    own = session.default_conditioning(file)
    _refuse_other(asked, str(file.path), set() if own is None else set(own.rows))
    if own is None or not asked.options:
        return None
    scale = own.guidance if asked.guidance is None else asked.guidance
    if scale != 1 and not own.guided and (file.about["graph"] == "step" or not own.unconditional):
        raise GaqError(f"{file.path} has no guidance: calibrate with --guidance {scale:g}, and build again.")
    if asked.prompts is not None:
        prompts = read_prompts(asked.prompts)
        with session.open_texts(file) as found:
            return text_encoder.prompt_conditioning(found, prompts, scale)
    if asked.classes is None:
        return replace(own, guidance=scale)
    unconditional = int(own.unconditional[LABELS]) if own.unconditional else None
    chosen = parse_classes(asked.classes, file.about["model"]["classes"] if unconditional is None else unconditional)
    return class_conditioning(chosen, unconditional=unconditional, guidance=scale)


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


def _refuse_other(asked: ConditioningRequest, who: str, conditioning: set[str]) -> None:
    """Raise GaqError if something was asked for that a network is not told."""
    if not conditioning and asked.options:
        raise GaqError(f"{who} is told nothing: leave out {', '.join(asked.options)}.")
    if asked.classes is not None and conditioning != {LABELS}:
        raise GaqError(f"{who} is told texts, not classes: give --prompts FILE in place of --classes.")
    if asked.prompts is not None and text_encoder.STATES not in conditioning:
        raise GaqError(f"{who} is told classes, not texts: give --classes in place of --prompts.")
