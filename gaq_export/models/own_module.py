"""Make a module of the caller's ready for everything else, or say in one line what is wrong with it.

In: any module that predicts noise, and the shape of its images. Out: a module in float32, called as (x, t) or
(x, t, cond), that returns one tensor of the shape of x, and whose weights are plain tensors. The module is run once or
twice on noise, so that what cannot work is known before a calibration begins.
"""

from typing import Any

import torch
from torch import Tensor, nn

from calib.folding import fold_batch_norms, fold_weights
from calib.shared_copy import copy_sharing_tensors
from calib.sqnr import sqnr_db
from gaq_export.diffusion.denoiser import Condition
from gaq_export.errors import GaqError
from gaq_export.models.architectures import ARCHITECTURES, as_denoiser
from gaq_export.models.trial import ROWS, Example, failed, noise_of, require_image_shape, run

_ADVICE = "Give wrap the shape that it takes, and the conditioning if it takes any."
# An image comes out the same, but for rounding, whatever else is in its batch; 60 dB leave room for other kernels.
_SAME_DB = 60.0


class NoiseOutput(nn.Module):
    """Return the predicted noise of a network that wraps it, in a tuple of one or as the `sample` of an object.

    Args:
        network: called as (x, t), or (x, t, cond).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Predict the noise in `x` (N, C, H, W) at timesteps `t` (N,)."""
        out = noise_of(self.network(x, t, cond) if cond else self.network(x, t))
        assert out is not None  # as the trial has shown
        return out


def prepare(module: nn.Module, example: Example) -> nn.Module:
    """Return the module as everything here uses it; itself if nothing has to be changed, and never changed in place.

    Weights in another type than float32 are converted; weight norms, spectral norms and other parametrizations are
    computed once; a batch norm behind a layer is folded into it (`calib.folding`).

    Args:
        module: the network; it is put into evaluation mode.
        example: what it is called with.

    Raises:
        GaqError: it is no module, its forward pass fails, or it returns something else than one tensor like x.
    """
    if not isinstance(module, nn.Module):
        raise GaqError(f"A network must be a torch.nn.Module; found {type(module).__name__}.")
    require_image_shape(example.shape)
    plain = _in_float32(module.eval())
    if type(plain) in ARCHITECTURES:  # diffusers' own, which are called in their own way
        _try(as_denoiser(plain), example)
        return plain
    is_wrapped = _try(plain, example)
    plain = fold_batch_norms(fold_weights(plain), example.inputs())
    return NoiseOutput(plain).eval() if is_wrapped else plain


def _in_float32(module: nn.Module) -> nn.Module:
    """Return a module whose floating-point tensors are all float32, a copy if some are not."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(v.is_floating_point() and v.dtype != torch.float32 for v in tensors):
        module = copy_sharing_tensors(module).float()
    # Not the buffers: masks of attention are infinite, and no weights.
    broken = [name for name, v in module.named_parameters() if not bool(v.isfinite().all())]
    if broken:
        raise GaqError(f"The module's weight {broken[0]!r} holds NaN or infinite values, as float32 at least.")
    return module


def _try(network: nn.Module, example: Example) -> bool:
    """Run a network; raise GaqError if it cannot be used, else return whether its result wraps the noise."""
    inputs = example.inputs()
    try:
        returned = run(network, inputs)
    except Exception as error:  # whatever the caller's code raises
        raise failed(network, example, error, _ADVICE) from error
    out = noise_of(returned)
    if out is None or out.shape != inputs[0].shape or not out.is_floating_point():
        raise GaqError(
            f"The module must return the predicted noise, one tensor of the shape of x, {tuple(inputs[0].shape)}; "
            f"found {_described(returned if out is None else out)}. Wrap it in a module that returns the noise alone."
        )
    if not bool(out.isfinite().all()):
        t = inputs[1].tolist()
        raise GaqError(f"The module returns NaN or infinite numbers for images of standard normal noise at t = {t}.")
    _require_own_rows(network, inputs, out)
    return out is not returned


def _require_own_rows(network: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
    """Raise GaqError if what a network makes of an image depends on the others in its batch, or on chance."""

    def differs(first: int) -> bool:
        rows = slice(first, None)
        part = [{k: v[rows] for k, v in one.items()} if isinstance(one, dict) else one[rows] for one in inputs]
        again = noise_of(run(network, tuple(part)))
        same = again is not None and (torch.equal(out[rows], again) or sqnr_db(out[rows], again) >= _SAME_DB)
        return not same

    if not differs(ROWS - 1):  # the last, since code that forgets the batch mostly takes the first
        return
    if differs(0):
        raise GaqError("The module returns something else each time: it draws random numbers, which no engine repeats.")
    raise GaqError(
        "The module mixes the images of a batch: the last comes out otherwise when it is alone. Each image has its own "
        "timestep, t[i] and not t[0]; a batch norm needs running statistics (track_running_stats=True)."
    )


def _described(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"{tuple(returned.shape)} {returned.dtype}".replace("torch.", "")
    many = isinstance(returned, (tuple, list, dict))
    return f"a {type(returned).__name__}{f' of {len(returned)}' if many else ''}"
