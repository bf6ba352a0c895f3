"""Find what would stop a build before a calibration begins, and say it in one line.

Every model is run once on noise, at the first and the last timestep that its sampler visits. A network that is not one
of those that are known here is exported as well: what torch cannot export cannot be built, and each layer that is to be
quantized must be in the graph with its own weight, since the plan's codes take that weight's place.
"""

import logging
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from calib.config import QuantConfig
from calib.float_layers import float_reasons
from calib.trace import trace
from gaq_export.diffusion.loop import noise
from gaq_export.diffusion.schedule import timesteps
from gaq_export.errors import GaqError
from gaq_export.graph.export import export_float
from gaq_export.graph.qdq import layer_weights
from gaq_export.graph.step import make_step
from gaq_export.models import trial
from gaq_export.models.architectures import ARCHITECTURES
from gaq_export.models.loader import LoadedModel
from gaq_export.models.trial import Example

_log = logging.getLogger(__name__)


def check_network(model: LoadedModel, config: QuantConfig) -> None:
    """Raise GaqError if a model cannot be calibrated as `config` says, or no engine could be built of it.

    Args:
        model: with its conditioning and the sampler that it will be drawn with.
        config: which layers are to be quantized.
    """
    _require_finite(model)
    if type(model.module) not in ARCHITECTURES:
        _require_graph(model, config)


def _require_finite(model: LoadedModel) -> None:
    """Run the network at the first and last timestep; raise GaqError if what it returns is not finite."""
    visited = timesteps(model.spec.sampler, model.schedule.num_train)
    t = visited[[0, -1]]
    x = noise([0, 1], 0, model.shape)
    cond = {name: row.expand(2, *row.shape[1:]) for name, row in model.condition_inputs.items()}
    try:
        out: Tensor = trial.run(model.network, (x, t, cond) if cond else (x, t))
    except Exception as error:  # whatever the network's code raises, or diffusers' for a config that it built
        example = Example(shape=model.shape, timesteps=model.schedule.num_train, condition=model.condition_inputs)
        raise trial.failed(model.network, example, error, "Its config.json or its code has to be corrected.") from error
    broken = [int(one) for one, image in zip(t, out, strict=True) if not bool(image.isfinite().all())]
    if broken == [0] and len(visited) > 1:
        raise GaqError(
            "The network returns NaN or infinite numbers at timestep 0 and not at others: it has no value there, as "
            "the logarithm of a timestep (a Fourier embedding) has none at 0. Choose a spacing that ends before, such "
            "as --spacing from-1."
        )
    if broken:
        raise GaqError(f"The network returns NaN or infinite numbers for plain noise, at timestep {broken[0]}.")


def _require_graph(model: LoadedModel, config: QuantConfig) -> None:
    """Export the network, and compare what it holds with the layers that are to be quantized."""
    graph = export_float(model.network, model.shape, model.condition_inputs)
    present = layer_weights(graph.graph)
    traced = trace(model.network, model.shape, model.schedule.num_train, model.condition_inputs)
    reasons = float_reasons(traced, config.convention, config.keep_float)
    names = [layer.name for layer in traced.layers if layer.name not in reasons]
    missing = [name for name in names if name not in present]
    changed = [name for name in names if name not in missing and not _holds(model.network, name, present[name])]
    if missing or changed:
        layers = missing or changed
        how = "are not in the exported graph" if missing else "compute with another weight than they hold"
        patterns = " ".join(f"--keep-float {name!r}" for name in layers[:3])
        raise GaqError(
            f"{len(layers)} of {len(names)} layers {how}, so no codes can take their weights' place (first: "
            f"{layers[0]!r}). Keep them float: {patterns}, or keep_float in CalibrationOptions."
        )
    try:
        make_step(graph, model.schedule, model.spec.sampler, guided=model.guided)
    except GaqError as error:  # no reason to refuse, since an engine of the network alone needs no tables
        _log.warning("An engine of whole steps cannot be built of this network. %s", error)


def _holds(network: nn.Module, name: str, weights: Collection[npt.NDArray[np.float32]]) -> bool:
    """Return whether a layer's weight is the one that each of its nodes in the graph has, transposed or not."""
    own = network.get_submodule(name).get_parameter("weight").detach().numpy()
    return all(any(w.shape == one.shape and np.allclose(w, one, rtol=1e-4) for one in (own, own.T)) for w in weights)
