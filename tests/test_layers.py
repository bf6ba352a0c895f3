"""Who may import whom: three rooms, and an order inside the one that joins them. Lazy imports count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_ENTER = {"gaq_export": {"calib", "engines"}, "calib": set(), "engines": set()}

# A module may import those above it.
ORDER = (
    "errors",
    "schedule",
    "denoiser",
    "conditions",
    "samplers",
    "checkpoint",
    "hub",
    "ldm",
    "catalogue",
    "parts",
    "models",
    "texts",
    "images",
    "recipes",
    "presets",
    "run",
    "collect",
    "corrections",
    "learning",
    "onnx_export",
    "double",
    "graph_writer",
    "opening",
    "profiles",
    "onnx_files",
    "qdq",
    "latency",
    "temporal_tables",
    "half",
    "guidance",
    "stepgraph",
    "step_engine",
    "parity",
    "part_engines",
    "provenance",
    "drawing",
    "engine_unet",
    "telling",
    "exporting",
    "engine_check",
    "building",
    "samples",
    "shards",
    "frechet",
    "fidelity",
    "extractors",
    "imagesets",
    "crew",
    "inspection",
    "figures",
    "html",
    "page",
    "auto",
    "pipeline",
    "evaluation",
    "evaluate",
    "timing",
    "report",
    "publish",
    "card",
    "packs",
    "triton_client",
    "triton_repository",
    "report_page",
    "quality",
    "comparison",
    "cells",
    "measured",
    "tables",
    "compare",
    "checkup",
    "terminal",
    "options",
    "recipe_commands",
    "judging_commands",
    "sharing_commands",
    "cli",
    "__main__",
)


def _imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything imported, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _faults(room: str, module: str, source: str) -> list[str]:
    faults = []
    for name in _imports(source):
        top, _, rest = name.partition(".")
        if top in MAY_ENTER and top != room and top not in MAY_ENTER[room]:
            faults.append(f"{room}/{module}.py enters {top}: {name}")
        target = rest.partition(".")[0]
        ordered = room == top == "gaq_export" and target in ORDER and module in ORDER
        if ordered and ORDER.index(target) >= ORDER.index(module):
            faults.append(f"gaq_export/{module}.py imports {target}, which comes after it")
    return faults


def _modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_ENTER)
def test_no_module_enters_a_room_it_may_not(room: str) -> None:
    modules = _modules(room)
    assert modules
    assert [fault for path in modules for fault in _faults(room, path.stem, path.read_text(encoding="utf-8"))] == []


def test_the_order_names_every_module() -> None:
    assert {path.stem for path in _modules("gaq_export")} - {"__init__"} - set(ORDER) == set()


@pytest.mark.parametrize(
    ("room", "module", "source"),
    [
        ("calib", "data", "import gaq_export.models"),
        ("engines", "ort", "def f():\n    from calib.plan import QuantPlan"),
        ("gaq_export", "schedule", "from gaq_export import models"),
        ("gaq_export", "models", "def f():\n    from gaq_export.cli import app"),
    ],
)
def test_a_forbidden_import_is_found_even_inside_a_function(room: str, module: str, source: str) -> None:
    assert len(_faults(room, module, source)) == 1
