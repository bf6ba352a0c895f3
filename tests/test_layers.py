"""Who may import whom: three packages, and a ladder of sub-packages inside `gaq_export`. Lazy imports count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"gaq_export": {"calib", "engines"}, "calib": set(), "engines": set()}

# A sub-package (or module) of gaq_export may import those on lower rungs, never a neighbour on its own.
LADDER = (
    {"_version", "errors"},
    {"cluster", "devices", "run", "folders", "images"},
    {"diffusion"},
    {"models", "graph"},
    {"quantize"},
    {"deploy"},
    {"sampling"},
    {"evaluation"},
    {"report"},
    {"comparison", "sharing"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
)
RUNG = {name: rung for rung, names in enumerate(LADDER) for name in names}


def _imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything imported, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _faults(module: str, source: str) -> list[str]:
    """Return what a module, by its dotted name, imports and may not."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    faults = []
    for name in _imports(source):
        top, _, inner = name.partition(".")
        if top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]:
            faults.append(f"{module} imports {name}: {package} may not import {top}")
        target = inner.partition(".")[0]
        climbs = room != target and RUNG.get(target, -1) >= RUNG.get(room, len(LADDER))
        if package == top == "gaq_export" and climbs:
            faults.append(f"{module} imports {name}, which is not below it")
    return faults


def _modules(package: str) -> dict[str, Path]:
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / package).rglob("*.py"))}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_module_imports_what_it_may_not(package: str) -> None:
    modules = _modules(package)
    assert modules
    assert [f for name, path in modules.items() for f in _faults(name, path.read_text(encoding="utf-8"))] == []


def test_the_ladder_names_every_room() -> None:
    assert {name.split(".")[1] for name in _modules("gaq_export")} - {"__init__"} == set(RUNG)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("calib.data", "import gaq_export.models"),
        ("engines.onnx_runtime", "def f():\n    from calib.plan import QuantPlan"),
        ("gaq_export.diffusion.schedule", "from gaq_export import models"),
        ("gaq_export.graph.qdq", "from gaq_export.models.loader import load_model"),
        ("gaq_export.models.loader", "def f():\n    from gaq_export.cli.app import app"),
    ],
)
def test_a_forbidden_import_is_found_even_inside_a_function(module: str, source: str) -> None:
    assert len(_faults(module, source)) == 1


def test_diffusion_needs_no_diffusers() -> None:
    names = {
        n.partition(".")[0]
        for m, p in _modules("gaq_export").items()
        if ".diffusion" in m
        for n in _imports(p.read_text())
    }
    assert "diffusers" not in names
    assert "torch" in names
