"""Writing a folder replaces all of it or none, and only one of the same kind; names in records stay in their folder."""

from pathlib import Path

import pytest

from gaq_export.errors import GaqError
from gaq_export.folders import check_replaceable, inside, replace_folder, staging


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
