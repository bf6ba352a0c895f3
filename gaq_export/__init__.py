"""Quantize a diffusion model, emit Q/DQ ONNX, build a low-bit engine and draw with it.

Everything that a user needs is here, and is loaded when it is first used, so that importing this package is quick:

    import gaq_export as gaq

    model = gaq.load_model("ddpm-mnist")
    plan = gaq.calibrate(model, gaq.preset("fast"))
    engine = gaq.build_engine()
    images = gaq.sample().images

Importing also makes sure that `calib` and `engines`, the two packages that this one is built on, are those installed
beside it. Their names are short enough for a stray file in the current folder to take their place, and the error that
follows would then point anywhere but at the cause.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gaq_export._version import __version__

if TYPE_CHECKING:
    from calib.errors import CalibError
    from calib.plan import QuantPlan, load_plan
    from calib.progress import Progress
    from engines import EngineConfig
    from engines.errors import EngineError
    from engines.files import EngineFile
    from gaq_export.comparison.compare import compare
    from gaq_export.comparison.pages import PagePaths
    from gaq_export.deploy.build import Built, build_engine
    from gaq_export.deploy.onnx_artifact import export_onnx
    from gaq_export.diffusion.conditioning import Conditioning, class_conditioning
    from gaq_export.diffusion.schedule import NoiseSchedule, SamplerSpec, linear_schedule
    from gaq_export.errors import GaqError
    from gaq_export.evaluation.evaluate import DrawingOptions, Evaluation, evaluate_engines, evaluate_sets
    from gaq_export.models.loader import LoadedModel, load_model, wrap
    from gaq_export.models.registry import MODELS
    from gaq_export.models.text_encoder import prompt_conditioning
    from gaq_export.quantize.calibrate import calibrate
    from gaq_export.quantize.make_plan import CalibrationCallbacks
    from gaq_export.quantize.presets import CalibrationOptions, Preset, preset
    from gaq_export.quantize.recipes import RECIPES
    from gaq_export.quantize.verdict import Verdict, judge
    from gaq_export.report.inspect import inspect
    from gaq_export.report.inspection import InspectionOptions
    from gaq_export.report.report import ReportOptions
    from gaq_export.report.write import write_report
    from gaq_export.sampling.diffusers_unet import EngineUNet
    from gaq_export.sampling.png_folder import Sampled
    from gaq_export.sampling.sample import Streamed, sample, sample_shards

# Which module has which names. No name may be that of a sub-package: importing it would hide the function.
_NAMES = {
    "calib.errors": ("CalibError",),
    "calib.plan": ("QuantPlan", "load_plan"),
    "calib.progress": ("Progress",),
    "engines": ("EngineConfig",),
    "engines.errors": ("EngineError",),
    "engines.files": ("EngineFile",),
    "gaq_export.comparison.compare": ("compare",),
    "gaq_export.comparison.pages": ("PagePaths",),
    "gaq_export.deploy.build": ("Built", "build_engine"),
    "gaq_export.deploy.onnx_artifact": ("export_onnx",),
    "gaq_export.diffusion.conditioning": ("Conditioning", "class_conditioning"),
    "gaq_export.diffusion.schedule": ("NoiseSchedule", "SamplerSpec", "linear_schedule"),
    "gaq_export.errors": ("GaqError",),
    "gaq_export.evaluation.evaluate": ("DrawingOptions", "Evaluation", "evaluate_engines", "evaluate_sets"),
    "gaq_export.models.loader": ("LoadedModel", "load_model", "wrap"),
    "gaq_export.models.registry": ("MODELS",),
    "gaq_export.models.text_encoder": ("prompt_conditioning",),
    "gaq_export.quantize.calibrate": ("calibrate",),
    "gaq_export.quantize.make_plan": ("CalibrationCallbacks",),
    "gaq_export.quantize.presets": ("CalibrationOptions", "Preset", "preset"),
    "gaq_export.quantize.recipes": ("RECIPES",),
    "gaq_export.quantize.verdict": ("Verdict", "judge"),
    "gaq_export.report.inspect": ("inspect",),
    "gaq_export.report.inspection": ("InspectionOptions",),
    "gaq_export.report.report": ("ReportOptions",),
    "gaq_export.report.write": ("write_report",),
    "gaq_export.sampling.png_folder": ("Sampled",),
    "gaq_export.sampling.diffusers_unet": ("EngineUNet",),
    "gaq_export.sampling.sample": ("Streamed", "sample", "sample_shards"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "MODELS",
    "RECIPES",
    "Built",
    "CalibError",
    "CalibrationCallbacks",
    "CalibrationOptions",
    "Conditioning",
    "DrawingOptions",
    "EngineConfig",
    "EngineError",
    "EngineFile",
    "EngineUNet",
    "Evaluation",
    "GaqError",
    "InspectionOptions",
    "LoadedModel",
    "NoiseSchedule",
    "PagePaths",
    "Preset",
    "Progress",
    "QuantPlan",
    "ReportOptions",
    "Sampled",
    "SamplerSpec",
    "Streamed",
    "Verdict",
    "__version__",
    "build_engine",
    "calibrate",
    "class_conditioning",
    "compare",
    "evaluate_engines",
    "evaluate_sets",
    "export_onnx",
    "inspect",
    "judge",
    "linear_schedule",
    "load_model",
    "load_plan",
    "preset",
    "prompt_conditioning",
    "sample",
    "sample_shards",
    "wrap",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that this function runs once for each name
    return value


def __dir__() -> list[str]:
    return __all__


def _check_packages() -> None:
    """Raise ImportError if Python finds another `calib` or `engines` than those installed beside this package."""
    parent = Path(__file__).resolve().parent.parent
    for package in ("calib", "engines"):
        spec = find_spec(package)  # does not import it, so no stray file is run
        expected = parent / package / "__init__.py"
        actual = spec.origin if spec is not None else None
        # A folder without __init__.py is a namespace package, whose origin is None.
        if actual is None or Path(actual).resolve() != expected:
            raise ImportError(
                f"gaq_export needs its own package {package!r} at {expected}, but Python finds {actual or 'none'}. "
                f"Rename or move the other {package!r}, run from another folder, or install gaq-export in a separate "
                "virtual environment."
            )


_check_packages()
