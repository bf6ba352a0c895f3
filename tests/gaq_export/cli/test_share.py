"""The commands that share a run: a pack, and one line for what cannot be shared."""

from pathlib import Path

from gaq_export.models.loader import LoadedModel
from tests.gaq_export.commands import gaq, refused


def test_a_run_is_packed_and_the_command_says_where_and_how_large(
    tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    result = gaq("pack", tiny_run, "--out", tmp_path / "pack", "--license", "mit")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "pack") in result.stdout
    assert "MB" in result.stdout
    assert (tmp_path / "pack" / "pack.json").is_file()


def test_what_cannot_be_shared_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    assert "tmp-nothing" in refused(tmp_path, "pack", tmp_path / "tmp-nothing")
    assert "pack.json" in refused(tmp_path, "pull", "owner/name", "--out", _taken(tmp_path))
    assert "no backend for 'openvinoo'" in refused(
        tmp_path, "triton", tiny_run, tmp_path / "served", "--backend", "openvinoo"
    )


def _taken(folder: Path) -> Path:
    """Return a folder that holds something else than a pack."""
    taken = folder / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    return taken
