"""Turn the options of a command into conditioning: classes by number or prompts by line, and the guidance scale.

In: a model and a `ConditioningRequest`. Out: the model with the `Conditioning` that was requested.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DModel

from gaq_export.diffusion.conditioning import LABELS, class_conditioning
from gaq_export.diffusion.schedule import under_guidance
from gaq_export.errors import GaqError
from gaq_export.models import text_encoder
from gaq_export.models.architectures import class_rows
from gaq_export.models.loader import LoadedModel

PROMPTS, PROMPT_BYTES = 100_000, 1 << 24  # at most, since the states of all are in memory


@dataclass(frozen=True, kw_only=True)
class ConditioningRequest:
    """The options of a command, None for each that was left out.

    Attributes:
        classes: "all", or numbers and ranges of them, as in 0-4,7.
        prompts: file with one prompt a line.
        guidance: scale of classifier-free guidance; 1 is none.

    Raises:
        GaqError: the scale is not a finite number.
    """

    classes: str | None = None
    prompts: Path | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise GaqError(f"Found a guidance of {self.guidance}; give a number, such as 3.0, or 1 for none.")

    @property
    def options(self) -> list[str]:
        """The names of the options that the user set, such as "--classes"."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]


def condition_model(model: LoadedModel, request: ConditioningRequest = ConditioningRequest()) -> LoadedModel:
    """Return the model with conditioning: as requested, or all classes with the guidance of the model table.

    Its sampler becomes one that suits the guidance, see `schedule.under_guidance`.

    Args:
        model: from `load_model`; one with conditioning, or an unconditional one, is returned as it is.
        request: what to draw.

    Raises:
        GaqError: the request does not suit the network, or the network needs prompts and there are none.
    """
    if model.conditioning is not None:
        return model
    refuse_unsuitable(request, f"The network of {model.spec.name!r}", set(model.condition_inputs))
    if not model.condition_inputs:
        return model
    scale = model.spec.guidance if request.guidance is None else request.guidance
    rows = class_rows(model.module)  # classes, the unconditional one included
    if rows is not None and set(model.condition_inputs) == {LABELS}:
        # A plain U-Net's config does not say whether its last class is the unconditional one: guidance implies it.
        has_null = scale != 1 or model.spec.guidance != 1 or not isinstance(model.module, UNet2DModel)
        count = rows - 1 if has_null else rows
        null = count if has_null else None  # the last row of the table
        chosen = parse_classes(request.classes or "all", count)
        conditioning = class_conditioning(chosen, unconditional=null, guidance=scale)
    elif request.prompts is None:
        raise GaqError(f"{model.spec.name!r} draws from prompts: give --prompts FILE, one a line.")
    else:
        conditioning = text_encoder.prompt_conditioning(model, read_prompts(request.prompts), scale)
    # The scale is known only here, and it decides whether x0 may be clipped without epsilon.
    sampler = under_guidance(model.spec.sampler, model.schedule, scale)
    return replace(model, conditioning=conditioning, spec=replace(model.spec, sampler=sampler))


def parse_classes(text: str, count: int) -> list[int]:
    """Read "all", "0-9" or "3,7-9" of `count` classes.

    >>> parse_classes("3,7-9", 10)
    [3, 7, 8, 9]
    """
    if text.strip() == "all":
        return list(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        # Before the range is written out, which may be longer than memory.
        if not first <= last < count:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise GaqError(
                f"Found classes {shown!r}; write all, or numbers of 0 to {count - 1} and ranges of them, the smaller "
                "number first, as in 3,7 or 0-9."
            )
        numbers += range(first, last + 1)
    return numbers


def read_prompts(file: Path) -> list[str]:
    """Read prompts, one a line, in UTF-8 with or without a mark in front.

    Raises:
        GaqError: the file cannot be read, is no text, is larger than PROMPT_BYTES, or holds no or too many prompts.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(PROMPT_BYTES + 1)  # no more: a device never ends
        text = content[:PROMPT_BYTES].decode("utf-8-sig")
    except OSError as error:
        raise GaqError(f"Cannot read the prompts {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise GaqError(f"The prompts {file} are no text in UTF-8 (byte {error.start}): save them as such.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if len(content) > PROMPT_BYTES or len(prompts) > PROMPTS:
        raise GaqError(f"{file} holds more than {PROMPTS} prompts or {PROMPT_BYTES >> 20} MiB: give fewer at a time.")
    if control := re.search(r"[\x00-\x08\x0e-\x1f\x7f]", "".join(prompts)):
        raise GaqError(f"The prompts {file} are no text: they hold the character {control[0]!r}.")
    if not prompts:
        raise GaqError(f"{file} holds no prompts: write one a line.")
    return prompts


def refuse_unsuitable(request: ConditioningRequest, who: str, inputs: set[str]) -> None:
    """Raise GaqError if a request names what a network with these condition inputs does not take."""
    if not inputs and request.options:
        raise GaqError(f"{who} is unconditional: leave out {', '.join(request.options)}.")
    # Only where labels are all that it takes: a network with prompts and labels is drawn from prompts.
    if request.classes is not None and inputs != {LABELS}:
        raise GaqError(f"{who} takes prompts, not classes: give --prompts FILE in place of --classes.")
    if request.prompts is not None and text_encoder.STATES not in inputs:
        raise GaqError(f"{who} takes classes, not prompts: give --classes in place of --prompts.")
