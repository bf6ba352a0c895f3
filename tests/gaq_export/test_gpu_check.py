"""What the GPU check measures of an engine, on one that runs here."""

import json
from pathlib import Path

from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.models.loader import LoadedModel
from gpu_check import examine, page

SPEC = SamplerSpec(steps=3)


def test_an_engine_is_built_checked_and_timed_and_another_is_said_to_fail(
    tiny_run: Path, tiny_model: LoadedModel
) -> None:
    found = {
        f"{backend}/float32": json.loads(json.dumps(examine(tiny_model, SPEC, tiny_run, backend, "float32", 2)))
        for backend in ("openvino", "tensorrt")
    }
    measured, failed = found.values()
    assert measured["parity_db"] >= measured["required_db"]
    assert len(measured["loop_seconds"]) == 5
    assert min(measured["loop_seconds"]) > 0
    assert measured["batch_difference"] < 0.05
    assert measured["plan_bytes"] > 10_000
    lines = list(page(found, ("cpu", 10.0), 2))
    assert [line for line in lines if line.startswith("| openvino, float32 |")]
    if "failed" in failed:
        assert lines[-1] == f"\ntensorrt, float32: **not run**, {failed['failed']}"
