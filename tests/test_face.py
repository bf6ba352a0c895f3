"""What a user meets first: the help, the version, the names in `gaq_export`, and the check of its two packages."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import gaq_export

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "openvino",
    "numpy",
    "tensorrt",
    "tensorrt_rtx",
    "huggingface_hub",
    "matplotlib",
}

_HELP = """
import sys
from gaq_export.cli.app import app
try:
    app(["--help"])
except SystemExit as done:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}))
    raise
"""


def _python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_loads_nothing_heavy() -> None:
    done = _python("-c", _HELP)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "typer" in loaded
    assert loaded & HEAVY == set()


def test_importing_the_package_loads_nothing_heavy() -> None:
    done = _python("-c", "import sys, gaq_export, gaq_export.errors; print(*sys.modules)")
    assert {name.partition(".")[0] for name in done.stdout.split()} & HEAVY == set()


def _imports_for_type_checkers() -> dict[str, str]:
    """Return the module of each name that `gaq_export/__init__.py` imports under TYPE_CHECKING."""
    tree = ast.parse(Path(gaq_export.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_names_are_the_same_at_run_time_and_for_type_checkers() -> None:
    names = gaq_export.__all__  # sorted: the linter sees to that
    assert len(names) == len(set(names))
    assert set(names) == {"__version__", *gaq_export._MODULE_OF}
    assert _imports_for_type_checkers() == gaq_export._MODULE_OF
    assert dir(gaq_export) == sorted(names)


def test_no_name_hides_a_sub_package() -> None:
    assert {module.name for module in pkgutil.iter_modules(gaq_export.__path__)} & set(gaq_export.__all__) == set()


@pytest.mark.parametrize("name", sorted(gaq_export._MODULE_OF))
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(gaq_export, name)
    if isinstance(value, Mapping):
        assert value
    else:
        assert value.__module__.partition(".")[0] in ("gaq_export", "calib", "engines")
        assert inspect.getdoc(value)
        assert not value.__doc__.startswith(f"{value.__name__}(")  # what a dataclass without a docstring gets


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'calibrat'"):
        gaq_export.calibrat  # noqa: B018


def test_version_and_changelog_agree() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == gaq_export.__version__


def test_a_stray_module_in_the_place_of_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "calib.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r}); import gaq_export"
    done = _python("-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: gaq_export needs its own package 'calib'")
    assert str(tmp_path / "calib.py") in message


def test_a_bare_folder_with_the_name_of_a_room_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r}); import gaq_export"
    assert _python("-I", "-c", code, cwd=tmp_path).returncode == 0


def test_the_user_errors_are_the_errors_of_the_three_rooms() -> None:
    from calib.errors import CalibError
    from engines.errors import EngineError
    from gaq_export.errors import GaqError, user_errors

    assert user_errors() == (GaqError, CalibError, EngineError)


def test_the_pipeline_has_the_same_functions_as_the_face() -> None:
    from gaq_export import pipeline

    shared = set(pipeline.__all__) - {"sampler_of"}
    assert shared <= set(gaq_export.__all__)
    assert all(getattr(pipeline, name) is getattr(gaq_export, name) for name in shared)
