"""Run commands of the command line in this process."""

from pathlib import Path

from typer.testing import CliRunner

from gaq_export.cli.app import app


def gaq(*words: object):
    """Run one command in this process and return its exit code and what it printed."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"GAQ_EXPORT_PRESET": "tiny"})


def refused(folder: Path, *words: object) -> str:
    """Run a command that must fail on one line, leaving `folder` as it was; return the line."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    result = gaq(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    return lines[0]
