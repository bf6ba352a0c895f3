"""Choose what an engine draws: its record's conditioning, changed by the options of a command.

In: an engine file and a `ConditioningRequest`. Out: a `Conditioning`.
"""

from dataclasses import replace

from engines import EngineFile
from gaq_export.deploy import session
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.conditioning import LABELS, Conditioning, class_conditioning
from gaq_export.errors import GaqError
from gaq_export.models import text_encoder
from gaq_export.models.conditioning_request import (
    ConditioningRequest,
    parse_classes,
    read_prompts,
    refuse_unsuitable,
)
from gaq_export.models.provenance import load_conditioning


def condition_engine(file: EngineFile, request: ConditioningRequest) -> Conditioning | None:
    """Return what to draw with an engine: its record's conditioning, changed as requested; None for no request.

    Raises:
        GaqError: the request does not suit the network, or it has guidance and the engine has none.
    """
    record = record_of(file)
    default = load_conditioning(record.provenance, file.path.parent)
    refuse_unsuitable(request, str(file.path), set() if default is None else set(default.rows))
    if default is None or not request.options:
        return None
    scale = default.guidance if request.guidance is None else request.guidance
    # A graph of whole steps has inputs for guidance only if it was built with it, and then takes any scale.
    if scale != 1 and not default.guided and (record.whole_steps or not default.unconditional):
        raise GaqError(f"{file.path} has no guidance: calibrate with --guidance {scale:g}, and build again.")
    if request.prompts is not None:
        prompts = read_prompts(request.prompts)
        with session.open_texts(file) as texts:
            return text_encoder.prompt_conditioning(texts, prompts, scale)
    if request.classes is None:
        return replace(default, guidance=scale)
    # The class that stands for none comes last, so its label is also the number of classes to choose from.
    null = int(default.unconditional[LABELS]) if default.unconditional else None
    count = record.provenance.classes if null is None else null
    assert count is not None  # a network that takes classes has a table of them
    return class_conditioning(parse_classes(request.classes, count), unconditional=null, guidance=scale)
