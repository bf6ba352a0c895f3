"""One function for each command, from the module that does the work.

    calibrate     float model       -> QuantPlan in a run folder
    build_engine  run folder        -> Q/DQ ONNX -> engine, audited and checked against PyTorch
    sample        engine            -> images, or files of many with `sample_shards`
    inspect       run folder        -> a page about its calibration
    evaluate_*    engines or images -> scores
    write_report  engine            -> a page about its images, size and speed
    compare       recipes           -> a page with the results of each

A model is a `LoadedModel`: `load_model` makes one from a name or a folder, `wrap` from any module that is called as
(x, t). Users find all of this, and the types beside it, in `gaq_export` itself.
"""

from gaq_export.comparison.compare import compare
from gaq_export.deploy.build import Built, build_engine
from gaq_export.deploy.onnx_artifact import export_onnx
from gaq_export.evaluation.evaluate import evaluate_engines, evaluate_sets
from gaq_export.models.loader import LoadedModel, load_model, wrap
from gaq_export.quantize.calibrate import calibrate, sampler_of
from gaq_export.quantize.presets import preset
from gaq_export.report.inspect import inspect
from gaq_export.report.write import write_report
from gaq_export.sampling.png_folder import Sampled
from gaq_export.sampling.sample import sample, sample_shards

__all__ = [
    "Built",
    "LoadedModel",
    "Sampled",
    "build_engine",
    "calibrate",
    "compare",
    "evaluate_engines",
    "evaluate_sets",
    "export_onnx",
    "inspect",
    "load_model",
    "preset",
    "sample",
    "sample_shards",
    "sampler_of",
    "wrap",
    "write_report",
]
