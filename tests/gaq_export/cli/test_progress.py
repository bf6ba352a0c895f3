"""What a long command shows while it works: by an injected clock, on a terminal, and in the log of a real command."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from calib.progress import Progress
from calib.reconstruct import BlockResult
from gaq_export.cli import progress
from gaq_export.cli.progress import Bar, Display, Log, Nowhere, Stage
from tests.gaq_export.commands import gaq


@dataclass
class Clock:
    """A clock that a test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Watched:
    """A log of 30-second lines and the display that writes to it, both by one clock; nothing is timed."""

    clock: Clock = field(default_factory=Clock)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = Log(self.lines.append, 30.0, self.clock)
        self.display = Display(shown_on=self.log, clock=self.clock)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def block(index: int, fraction: float, **more: object) -> Progress:
    name = f"block {index}"
    return Progress(stage="block", name=name, index=index, total=4, fraction=fraction, seconds={}, **more)


def finished(index: int, fraction: float, *, resumed: bool = False) -> Progress:
    result = BlockResult(name=f"block {index}", layers=(), loss_before=0.5, loss_after=0.25, rounding="adaround")
    return block(index, fraction, result=result, resumed=resumed)


def test_a_log_has_a_line_every_30_seconds_with_stage_share_and_time_left(watched: Watched) -> None:
    for second in range(101):
        watched.clock.now = float(second)
        watched.display.collect(second, 100)
    assert watched.lines == [
        "collecting 30/100 (30%), 1 min 10 s left",
        "collecting 60/100 (60%), 40 s left",
        "collecting 90/100 (90%), 10 s left",
    ]


def test_a_stage_that_reports_rarely_still_has_its_lines(watched: Watched) -> None:
    watched.display.collect(0, 100)
    watched.clock.now = 50.0
    watched.display.collect(50, 100)
    for second in range(51, 200):
        watched.clock.now = float(second)
        watched.log.beat()
    assert watched.lines == [
        "collecting 50/100 (50%), 50 s left",
        "collecting 50/100 (50%), 20 s left",  # 30 s later, and no news since
        "collecting 50/100 (50%), 1 min 50 s so far",  # later than it should have ended
        "collecting 50/100 (50%), 2 min 20 s so far",
        "collecting 50/100 (50%), 2 min 50 s so far",
    ]


def test_a_stage_that_never_reports_says_how_long_it_has_taken(watched: Watched) -> None:
    watched.clock.now = 5.0
    watched.display.stage("building with openvino")
    watched.clock.now = 29.0
    watched.log.beat()
    assert watched.lines == []
    watched.clock.now = 3665.0
    watched.log.beat()
    assert watched.lines == ["building with openvino, 1 h 01 min so far"]


def test_the_time_left_counts_from_where_this_process_began(watched: Watched) -> None:
    for index, share in enumerate((0.2, 0.4)):  # blocks that are read from the disk in no time
        watched.display.calibrate(finished(index, share, resumed=True))
    watched.clock.now = 30.0
    watched.display.calibrate(block(2, 0.5))  # a tenth of the work in 30 s, so another half in 150
    assert watched.lines == [
        "  1/4 block 0: loss 0.5 -> 0.25 (from an earlier run)",
        "  2/4 block 1: loss 0.5 -> 0.25 (from an earlier run)",
        "3/4 block 2 (50%), 2 min 30 s left",
    ]


def test_a_finished_block_is_a_line_at_once(watched: Watched) -> None:
    watched.display.calibrate(block(0, 0.1))
    watched.display.calibrate(finished(0, 0.25))
    assert watched.lines == ["  1/4 block 0: loss 0.5 -> 0.25"]


def test_a_stage_that_begins_again_is_timed_again(watched: Watched) -> None:
    watched.display.calibrate(block(0, 0.0))
    watched.clock.now = 10.0
    watched.display.calibrate(block(3, 1.0))
    watched.clock.now = 1000.0
    watched.display.calibrate(block(0, 0.0))  # of the next recipe
    watched.clock.now = 1030.0
    watched.display.calibrate(block(1, 0.5))
    assert watched.lines[-1] == "2/4 block 1 (50%), 30 s left"


def test_drawing_shows_images_a_second_of_this_process(watched: Watched) -> None:
    watched.display.images(100, 1000)  # drawn by an earlier one
    watched.clock.now = 60.0
    watched.display.images(220, 1000)
    assert watched.lines == ["drawing 220/1000, 2.00 images/s (22%), 6 min 30 s left"]


def test_the_clock_is_watched_by_a_thread_that_ends_with_the_command() -> None:
    lines: list[str] = []
    log = Log(lines.append, 0.0)
    with Display(shown_on=log) as display:
        assert log._watch.is_alive()
        display.stage("building")
    assert not log._watch.is_alive()
    assert lines == ["building, 0 s so far"]


def test_a_terminal_shows_a_bar_with_the_time_left_and_finished_blocks_above_it() -> None:
    clock, screen = Clock(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    with Display(shown_on=Bar(console, clock), clock=clock) as display:
        display.stage("loading the model")
        display.calibrate(block(0, 0.0))
        clock.now = 20.0
        display.calibrate(finished(0, 0.25))
    text = screen.getvalue()
    assert "  1/4 block 0: loss 0.5 -> 0.25" in text
    assert "1 min 00 s left" in text


def test_a_quiet_command_shows_nothing_and_another_shows_bars_only_on_a_terminal() -> None:
    assert isinstance(progress.output(quiet=True), Nowhere)
    assert isinstance(progress.output(quiet=False), Log)  # pytest has no terminal


def test_no_time_left_is_claimed_before_anything_is_done() -> None:
    stage = Stage(key="x", text="x", share=0.4, started=0.0, resumed_at=0.4, reported=0.0)
    assert stage.seconds_left(10.0) is None


def test_a_real_command_logs_every_stage_and_a_quiet_one_none(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    words = ("calibrate", "--weights", home, "--images", 2, "--iterations", 1, "--correct", "tac")
    loud = gaq(*words, "--run", tmp_path / "loud")
    assert loud.exit_code == 0, loud.output
    lines = loud.stderr.splitlines()
    for start in (
        "loading the model",
        "collecting 50/50 (100%), ",
        "14/14 ",
        "activation ranges (",
        "following the sampler, ",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert sum(": loss " in line for line in lines) == 14
    quiet = gaq(*words, "--run", tmp_path / "quiet", "--quiet")
    assert quiet.exit_code == 0
    assert all(line.startswith("warning: ") for line in quiet.stderr.splitlines())  # random weights have a poor verdict
