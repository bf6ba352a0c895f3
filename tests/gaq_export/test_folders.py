"""Writing a folder replaces all of it or none, and only a folder of the same kind."""

from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.folders import check_replaceable, replace_folder, staging


def test_a_staged_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with staging(out) as staged:
        finished = staged / "finished"
        finished.mkdir()
        (finished / "new").touch()
        replace_folder(finished, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_while_staging(out: Path) -> None:
    with staging(out) as staged:
        (staged / "half").touch()
        raise ZeroDivisionError


def test_a_failure_while_staging_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_staging(tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_staging_beside_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GaqError, match=r"Cannot write to .*file: .*Choose a folder you may write to"):
        fail_while_staging(tmp_path / "file" / "out")


def test_only_a_folder_of_the_same_kind_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_replaceable(out, "pack.json")
    out.mkdir()
    check_replaceable(out, "pack.json")
    (out / "thesis.tex").touch()
    with pytest.raises(GaqError, match=r"out is there and has no pack\.json"):
        check_replaceable(out, "pack.json")
    (out / "pack.json").touch()
    check_replaceable(out, "pack.json")
