"""What commands share: an error becomes one line, options replace a sampler's fields, random weights are announced."""

import errno
from pathlib import Path

import pytest
import typer

from calib.errors import CalibError
from engines.errors import EngineError
from gaq_export.cli.options import one_line_errors, replace_options, warn_if_meaningless
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError


@pytest.mark.parametrize("kind", [GaqError, CalibError, EngineError])
def test_an_error_that_a_user_can_cause_becomes_one_line_and_exit_code_2(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, one_line_errors():
        raise kind("No such file:\n  unet.plan")
    assert stopped.value.exit_code == 2
    assert capsys.readouterr() == ("", "error: No such file: unet.plan\n")


def test_a_place_that_the_system_refuses_becomes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, one_line_errors():
        (tmp_path / ("a" * 300)).mkdir()
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err.endswith("aaa: File name too long. Choose another place.\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: Out of memory (MemoryError): close other programs"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"),
            "error: Out",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "error: Out of memory on the GPU (CUDA out of memory.",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/unet.plan"),
            "error: No space left on the disk for a/unet",
        ),
    ],
)
def test_memory_or_a_disk_that_ran_out_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, one_line_errors():
        raise error
    assert stopped.value.exit_code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EACCES, "Permission denied")])
def test_other_errors_of_the_same_class_show_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_other_errors_show_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0


def test_only_options_that_were_given_change_a_sampler() -> None:
    spec = SamplerSpec(name="ddpm", steps=25)
    assert replace_options(spec, steps=None, name=None) == spec
    assert replace_options(spec, steps=10, name=None, spacing="quad") == SamplerSpec(
        name="ddpm", steps=10, spacing="quad"
    )
    with pytest.raises(GaqError, match="Unknown spacing 'cubic'"):
        replace_options(spec, spacing="cubic")


def test_random_weights_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_meaningless(False)
    assert capsys.readouterr().err == ""
    warn_if_meaningless(True)
    assert "meaningless" in capsys.readouterr().err
