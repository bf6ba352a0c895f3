"""How far a command is, on stderr: a bar on a terminal, elsewhere (nohup, CI, a notebook) a line every 30 seconds.

In: the progress callbacks of the library, each called with how much of a stage is done. Out: what a user reads. A
thread watches the clock, so that a stage which reports rarely, or not at all, still shows that it is alive.

rich is loaded when something is shown, so that `--help` need not wait for it.
"""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from calib.progress import Progress as CalibrationProgress

INTERVAL = 30.0  # seconds between two lines where the output is not a terminal


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a command, as of its last report.

    Attributes:
        key: names it; stages with another key are other stages.
        text: what a user reads.
        share: how much of it is done, from 0 to 1; None if that is unknown.
        started: when it began, in seconds of the display's clock.
        resumed_at: its share when it began; more than 0 if an earlier process did a part of it.
        reported: when it last reported.
    """

    key: str
    text: str
    share: float | None
    started: float
    resumed_at: float
    reported: float

    def seconds_left(self, now: float) -> float | None:
        """Return how long the rest should take, at the pace of this process so far; None if it cannot be known."""
        done = 0.0 if self.share is None else self.share - self.resumed_at
        if self.share is None or done <= 0:
            return None
        left = (self.reported - self.started) / done * (1 - self.share)
        # With no news for longer than everything should have taken, the pace is no longer known.
        return left - (now - self.reported) if left >= now - self.reported else None

    def line(self, now: float) -> str:
        """Return a line for a log: the stage, how much of it is done, how long it will take or has taken."""
        share = "" if self.share is None else f" ({self.share:.0%})"
        left = self.seconds_left(now)
        seconds = f"{duration(now - self.started)} so far" if left is None else f"{duration(left)} left"
        return f"{self.text}{share}, {seconds}"


class Output(Protocol):
    """A place where stages are shown, between `start` and `stop`."""

    def start(self) -> None:
        """Begin to show stages."""

    def stop(self) -> None:
        """Stop showing stages."""

    def show(self, stage: Stage) -> None:
        """Show a stage, new or with more of it done."""

    def print(self, text: str) -> None:
        """Write a line that stays."""


class Nowhere:
    """The output of a quiet command."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def show(self, stage: Stage) -> None:
        """Do nothing."""

    def print(self, text: str) -> None:
        """Do nothing."""


class Bar:
    """A bar on a terminal for the stage at work; it disappears when the command ends."""

    def __init__(self, console: "Console", clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        # Lines on stdout go above the bar if they are shown on the same terminal, else where stdout goes.
        self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        self._clock = clock
        self._tasks: dict[str, Any] = {}

    def start(self) -> None:
        """Draw the bar from now on."""
        self._bar.start()

    def stop(self) -> None:
        """Remove the bar."""
        self._bar.stop()

    def show(self, stage: Stage) -> None:
        """Move the bar, or begin another in its place."""
        if stage.key not in self._tasks:
            for finished in self._tasks.values():
                self._bar.update(finished, visible=False)
            total = None if stage.share is None else 1.0  # a bar without a total only shows that something goes on
            self._tasks[stage.key] = self._bar.add_task(stage.text, total=total, left="")
        seconds = stage.seconds_left(self._clock())
        left = "" if seconds is None else f"{duration(seconds)} left"
        self._bar.update(self._tasks[stage.key], completed=stage.share or 0.0, description=stage.text, left=left)

    def print(self, text: str) -> None:
        """Write a line above the bar."""
        self._bar.console.print(text, highlight=False)


class Log:
    """Lines, for output that is not a terminal: one at least every `interval` seconds, whether stages report or not.

    A command that takes less time writes none.
    """

    def __init__(
        self, write: Callable[[str], None], interval: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._interval = interval
        self._clock = clock
        self._stage: Stage | None = None
        self._written = clock()
        self._lock = threading.Lock()  # the thread that watches the clock writes too
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._watch_the_clock, daemon=True)

    def start(self) -> None:
        """Write lines from now on, also while no stage reports."""
        self._watch.start()

    def stop(self) -> None:
        """Write no more lines."""
        self._stopped.set()
        self._watch.join()

    def show(self, stage: Stage) -> None:
        """Write a line about the stage if it is time for one."""
        with self._lock:
            self._stage = stage
            self._write_if_due()

    def print(self, text: str) -> None:
        """Write a line."""
        with self._lock:
            self._write(text)
            self._written = self._clock()

    def beat(self) -> None:
        """Write a line about the stage last shown if it is time for one."""
        with self._lock:
            self._write_if_due()

    def _write_if_due(self) -> None:
        now = self._clock()
        if self._stage is not None and now - self._written >= self._interval:
            self._written = now
            self._write(self._stage.line(now))

    def _watch_the_clock(self) -> None:
        # Never less than a second, so that an interval of 0, with which every report is a line, costs nothing.
        while not self._stopped.wait(max(1.0, self._written + self._interval - self._clock())):
            self.beat()


def output(quiet: bool) -> Output:
    """Return where this process shows its stages."""
    from rich.console import Console

    if quiet:
        return Nowhere()
    console = Console(stderr=True)
    return Bar(console) if console.is_interactive else Log(lambda text: typer.echo(text, err=True), INTERVAL)


class Display:
    """Shows the stages of a command inside a `with` block; its methods are the progress callbacks of the library."""

    def __init__(
        self, quiet: bool = False, shown_on: Output | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output = shown_on or output(quiet)
        self._clock = clock
        self._stages: dict[str, Stage] = {}

    def __enter__(self) -> Self:
        self._output.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._output.stop()

    def stage(self, text: str) -> None:
        """Show a stage that does not report how much of it is done."""
        self._show(text, text, None)

    def collect(self, done: int, total: int) -> None:
        """Show how many network calls of the float sampler are done."""
        self._show("collect", f"collecting {done}/{total}", done / total)
        if done == total:  # the blocks are listed and timed before calibration reports for the first time
            self.stage("preparing")

    def calibrate(self, progress: "CalibrationProgress") -> None:
        """Show the block at work, and a line for each finished one."""
        if progress.resumed:  # an earlier process did this block: the pace is known from the next one on
            self._stages.pop("calibrate", None)
        number = f"{progress.index + 1}/{progress.total} " if progress.stage == "block" else ""
        self._show("calibrate", f"{number}{progress.name}", progress.fraction)
        result = progress.result
        if result is not None and result.loss_before is not None:  # with nearest rounding nothing is learned
            earlier = " (from an earlier run)" if progress.resumed else ""
            self._output.print(
                f"{progress.index + 1:3}/{progress.total} {result.name}: loss {result.loss_before:.3g} -> "
                f"{result.loss_after:.3g}{earlier}"
            )

    def correct(self, done: int, total: int) -> None:
        """Show at how many sampling steps the correction of the noise is measured."""
        self._show("correct", f"following the sampler, step {done}/{total}", done / total)

    def draw(self, network: str, done: int, total: int) -> None:
        """Show how many network calls of drawing are done."""
        self._show(network, f"drawing ({network}) {done}/{total}", done / total)

    def images(self, done: int, total: int) -> None:
        """Show how many images are drawn, and how many a second."""
        stage = self._stages.get("images")
        rate = ""
        if stage is not None:
            seconds = self._clock() - stage.started
            # Without those of an earlier process, which were no work of this one.
            drawn_here = done - stage.resumed_at * total
            rate = f", {drawn_here / seconds:.2f} images/s" if seconds > 0 and drawn_here > 0 else ""
        self._show("images", f"drawing {done}/{total}{rate}", done / total)

    def measure(self, text: str, done: int, total: int) -> None:
        """Show what is measured, and how much of it is done."""
        self._show(text, f"{text} {done}/{total}", done / total)

    def _show(self, key: str, text: str, share: float | None) -> None:
        now = self._clock()
        stage = self._stages.get(key)
        again = stage is not None and (stage.share or 0.0) > (share or 0.0)  # as calibration with the next recipe
        if stage is None or again:
            stage = Stage(key=key, text=text, share=share, started=now, resumed_at=share or 0.0, reported=now)
        self._stages[key] = replace(stage, text=text, share=share, reported=now)
        self._output.show(self._stages[key])


def duration(seconds: float) -> str:
    """Return a duration for people.

    >>> duration(75.2)
    '1 min 15 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
