"""Writing a folder replaces all of it or none, and only one of the same kind; names in records stay in their folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.folders import check_outputs, check_replaceable, inside, replace_folder, staging


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


@pytest.mark.parametrize("name", ["a", "sub/b", "sub/../a", "new"])
def test_names_in_a_record_are_of_files_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").touch()
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "..", "../other/a", "sub/../../a", "link", "link/a", "circle", "", "a\0b"]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(GaqError, match="leads out of that folder; only files inside it are read"):
        inside(folder, name)


def test_the_links_of_a_hub_cache_are_followed_to_its_own_files_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "123").touch()
    (tmp_path / "secret").touch()
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "shard").symlink_to(Path("../../../blobs/123"))
    (snapshot / "unet" / "other").symlink_to(tmp_path / "secret")
    assert inside(snapshot / "unet", "shard") == snapshot / "unet" / "shard"
    with pytest.raises(GaqError, match="leads out of that folder"):
        inside(snapshot / "unet", "other")


def as_it_is(file: Path, folder: Path) -> Path:
    return file


def by_a_link(file: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(file.parent)
    return folder / "link" / file.name


def by_dots(file: Path, folder: Path) -> Path:
    return file.parent / ".." / file.parent.name / file.name


def by_a_second_name(file: Path, folder: Path) -> Path:
    os.link(file, folder / "second")
    return folder / "second"


@pytest.mark.parametrize("spell", [as_it_is, by_a_link, by_dots, by_a_second_name])
def test_nothing_is_written_over_what_is_needed_however_it_is_spelled(
    spell: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    needed = folder / "plan.json"
    needed.touch()
    check_outputs([folder / "new"], [needed, folder / "missing"])
    with pytest.raises(GaqError, match=r"would overwrite .*plan\.json, which is still needed: choose another name"):
        check_outputs([folder / "new", spell(needed, tmp_path)], [folder / "missing", needed])


def test_no_file_goes_into_a_needed_folder_or_takes_a_folder_s_name(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match="would overwrite"):
        check_outputs([tmp_path / "calibration" / "0000.safetensors"], [tmp_path / "calibration"])
    with pytest.raises(GaqError, match="is a folder; give the name of a file"):
        check_outputs([tmp_path], [])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "is a folder; give the name of a file"),
        (os.mkfifo, "is a device or a pipe; give the name of a file"),
    ],
)
def test_a_file_takes_the_place_of_files_only(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(GaqError, match=words):
        check_outputs([tmp_path / "x"], [])
    with pytest.raises(GaqError, match="/dev/null is a device or a pipe"):
        check_outputs([Path("/dev/null")], [])


def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"Cannot write .*aaa: File name too long\. Choose another name"):
        check_outputs([tmp_path / ("a" * 300)], [])
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    check_outputs([tmp_path / "circle" / "x"], [tmp_path / "other"])  # whoever writes it reports the circle
