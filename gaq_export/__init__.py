"""Quantize a diffusion U-Net, emit QDQ ONNX, build an engine, run the sampling loop.

Importing this package loads nothing heavy. It only makes sure that the two rooms it is built on, `calib` and
`engines`, are the folders installed beside it: their names are short enough for a stray file in the current folder
to take their place, and the error that follows would then point anywhere but at the cause.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaq_export._version import __version__

if TYPE_CHECKING:
    from gaq_export.sampling.diffusers_unet import EngineUNet

__all__ = ["EngineUNet", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gaq_export.sampling.diffusers_unet import EngineUNet

    return EngineUNet


def _check_rooms() -> None:
    beside = Path(__file__).resolve().parent.parent
    for room in ("calib", "engines"):
        spec = find_spec(room)
        expected = beside / room / "__init__.py"
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != expected:
            raise ImportError(
                f"gaq_export needs its own package {room!r} at {expected}, but Python finds {found or 'none'}. "
                f"Rename or move the other {room!r}, run from another folder, or install gaq-export in a virtual "
                "environment of its own."
            )


_check_rooms()
