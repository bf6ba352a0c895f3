"""What a user meets first: the help, the version, and the guard at the door."""

import re
import subprocess
import sys
from pathlib import Path

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
