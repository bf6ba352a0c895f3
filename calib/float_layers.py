"""Which layers and attentions are quantized, and why the others stay float."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from calib.choices import Convention
from calib.errors import CalibError
from calib.trace import Layer, Trace


def float_reasons(traced: Trace, convention: Convention, keep_float: tuple[str, ...] = ()) -> dict[str, str]:
    """Return layer name -> why it stays float; layers not in it are quantized.

    Where the convention quantizes the products inside attention, the modules that keep them float are in it too.

    Args:
        traced: what `trace` saw.
        convention: which layers an engine, or a paper, keeps float.
        keep_float: shell patterns of the names of further layers, as for `--keep-float`.

    Raises:
        CalibError: a pattern matches no layer, or all layers stay float.
    """
    reasons: dict[str, str] = {}
    for layer in traced.layers:
        if layer.calls == 0:
            reasons[layer.name] = "its weight is used without calling it as a module"
        elif not layer.quantizable:
            reasons[layer.name] = f"{layer.kind} has no quantized form here"
    # A convention's first and last layer are those of the layers that could be quantized.
    usable = tuple(layer for layer in traced.layers if layer.name not in reasons)
    reasons |= CONVENTIONS[convention](usable)
    names = [layer.name for layer in traced.layers]
    if convention in WITH_PRODUCTS:
        names += traced.attentions
        reasons |= {n: "attention with a mask or other options" for n, able in traced.attentions.items() if not able}
    for pattern in keep_float:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise CalibError(f"--keep-float {pattern!r} matches no layer; names look like {usable[0].name!r}.")
        reasons |= dict.fromkeys(matches, f"asked for by {pattern!r}")
    if all(layer.name in reasons for layer in traced.layers):
        raise CalibError(f"No layer is left to quantize: all {len(traced.layers)} stay float.")
    return reasons


def quantized_products(traced: Trace, convention: Convention, reasons: Mapping[str, str]) -> list[str]:
    """Return the names of the modules whose products inside attention are quantized.

    Args:
        traced: what `trace` saw.
        convention: whether there are any.
        reasons: from `float_reasons`.
    """
    return [name for name in traced.attentions if convention in WITH_PRODUCTS and name not in reasons]


def require_batch_first(traced: Trace, names: Iterable[str]) -> None:
    """Check that the rows of a layer's input are samples, which have a step.

    Args:
        traced: what `trace` saw.
        names: of the layers that are checked.

    Raises:
        CalibError: the first axis of a layer's input is not the batch.
    """
    for name in names:
        if not traced.calls[name].plain:
            raise CalibError(
                f"Layer {name!r} is called with an input whose first axis is not the batch, so it cannot have a range "
                f"for each step: give up per-step ranges, or keep the layer float with --keep-float {name!r}."
            )


def _deploy(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Keep the first and last layer and whatever depends on the step alone; quantize the rest."""
    reasons = {layer.name: "depends on the step alone (temporal table)" for layer in layers if layer.by_step}
    return _ends(layers) | reasons


def _tfmq(layers: tuple[Layer, ...]) -> dict[str, str]:
    """Keep what TFMQ-DM keeps: first embedding layer, first and last convolution, shortcuts, down-sampling."""
    first_embedding = next((layer.name for layer in layers if layer.by_step), None)
    reasons = _ends(layers)
    if first_embedding:
        reasons[first_embedding] = "first time-embedding layer (TFMQ-DM)"
    for layer in layers:
        if layer.shortcut:
            reasons.setdefault(layer.name, "shortcut (TFMQ-DM)")  # the ends have their reason already
        elif layer.downsampling:
            reasons.setdefault(layer.name, "down-sampling (TFMQ-DM)")
    return reasons


def _ends(layers: tuple[Layer, ...]) -> dict[str, str]:
    # Embeddings of the step or of a class come earlier in call order, and are no ends.
    spatial = [layer.name for layer in layers if layer.depends_on_x]
    return {spatial[0]: "first layer", spatial[-1]: "last layer"} if spatial else {}


CONVENTIONS: dict[Convention, Callable[[tuple[Layer, ...]], dict[str, str]]] = {
    Convention.DEPLOY: _deploy,
    Convention.TFMQ: _tfmq,
}
WITH_PRODUCTS = (Convention.TFMQ,)  # the conventions that quantize the products inside attention
