"""Damage every file that is read, and see what comes: one line, or the right result after all, and nothing else.

    python benchmarks/fuzz.py --variants 1200 --out docs/results/fuzz.md

Each variant damages one file of a copy of the material and reads it in a process of its own. Outcomes:

- refused: one line for the user;
- made again: the result is that of the undamaged file, because what was damaged was noticed and made again, or does not
  matter;
- another: another result without a complaint. That is right for a file of a user's, which may well be another valid
  one, and wrong for a file of ours: then it is "believed";
- traceback, crash, hang: always wrong.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer

from command import command_line, write_markdown
from fuzz_targets import TARGETS, Target, make_material
from gaq_export.errors import user_errors
from gaq_export.report.markdown import machine, markdown_table
from options import Out

LIMIT = 30.0  # seconds for a variant


class Outcome(StrEnum):
    """How reading a damaged file ended."""

    REFUSED = "refused"
    AGAIN = "made again"
    ANOTHER = "another"
    BELIEVED = "believed"
    TRACEBACK = "traceback"
    CRASH = "crash"
    HANG = "hang"


WRONG = (Outcome.BELIEVED, Outcome.TRACEBACK, Outcome.CRASH, Outcome.HANG)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A damaged file: which, how, and how reading it ended, with the line or the digest."""

    target: str
    seed: int
    how: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """The undamaged material, and where a copy of it is read."""

    material: Path
    here: Path


def main(
    variants: Annotated[int, typer.Option(min=1, help="How many, over all targets.")] = 1200,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
    only: Annotated[str, typer.Option(help="Part of a target's name; all targets by default.")] = "",
    out: Out = None,
) -> None:
    """Damage files, read them, and print what went wrong; exit code 1 if anything did."""
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        here, material = Path(scratch) / "here", Path(scratch) / "material"
        here.mkdir()
        # In a child, as is everything that starts threads: a process with threads cannot be forked safely.
        made = _in_child(partial(make_material, here), 300.0)
        if made.outcome is not None:
            raise SystemExit(f"the material cannot be made: {made.detail}")
        # Every variant is read at the place where the material was made, since records hold the model's path.
        here.rename(material)
        seen = list(_run([t for t in TARGETS if only in t.name], variants, seed, Place(material=material, here=here)))
    wrong = [variant for variant in seen if variant.outcome in WRONG]
    for variant in wrong:
        print(f"{variant.outcome}: {variant.target} #{variant.seed}: {variant.how}\n    {variant.detail}")
    write_markdown(_page(seen, time.monotonic() - started), out)
    raise SystemExit(1 if wrong else 0)


def _run(targets: list[Target], variants: int, seed: int, place: Place) -> Iterator[Variant]:
    total = sum(target.weight for target in targets)
    for target in targets:
        expected = _in_child(partial(_undamaged, target, place), LIMIT)
        if expected.outcome is not None:
            raise SystemExit(f"{target.name} cannot be read even if nothing is damaged: {expected.detail}")
        for number in range(max(1, round(variants * target.weight / total))):
            yield _variant(target, seed * 100_000 + number, place, expected.detail)


def _undamaged(target: Target, place: Place) -> str:
    return _read(target, place, None)[1]


def _variant(target: Target, seed: int, place: Place, expected: str) -> Variant:
    random = Random(f"{target.name} {seed}")
    end = _in_child(lambda: "\n".join(_read(target, place, random)), LIMIT)
    how, _, digest = end.detail.partition("\n")
    outcome = end.outcome
    if outcome is None:
        unlike = Outcome.BELIEVED if target.ours else Outcome.ANOTHER
        outcome = Outcome.AGAIN if digest == expected else unlike
    return Variant(target=target.name, seed=seed, how=how, outcome=outcome, detail=digest)


def _read(target: Target, place: Place, random: Random | None) -> tuple[str, str]:
    """Copy the material, damage a file of it unless `random` is None, read it; return the damage and the digest."""
    shutil.rmtree(place.here, ignore_errors=True)
    shutil.copytree(place.material, place.here)
    os.chdir(place.here)
    how = ""
    if random is not None:
        file = random.choice(sorted(path for path in place.here.glob(target.files) if path.is_file()))
        how = f"{file.relative_to(place.here)}: {random.choice(target.mutations)(file, random)}"
    _AtWork.how = how
    return how, target.act(place.here)


class _AtWork:
    """The damage of the variant at work, for the report of a child that does not end well."""

    how = ""


@dataclass(frozen=True, kw_only=True)
class _End:
    """How a child ended: None for an outcome means that it returned `detail`."""

    outcome: Outcome | None
    detail: str


def _in_child(work: Callable[[], str], limit: float) -> _End:
    """Run `work` in a fork of this process; it can crash or hang without harm."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgid(0, 0)
        with contextlib.suppress(BaseException):
            os.write(writer, json.dumps(_outcome_of(work)).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    ready = select.select([reader], [], [], limit)[0]
    content = os.read(reader, 1 << 16) if ready else b""
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL) if not ready else None
    _, status = os.waitpid(child, 0)
    if not ready:
        return _End(outcome=Outcome.HANG, detail=f"?\nmore than {limit:g} s")
    if not content:
        return _End(outcome=Outcome.CRASH, detail=f"?\nexit status {status}")
    outcome, detail = json.loads(content)
    return _End(outcome=outcome and Outcome(outcome), detail=detail)


def _outcome_of(work: Callable[[], str]) -> tuple[str | None, str]:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    try:
        return None, work()
    except user_errors() as error:
        text = str(error)
        return (Outcome.REFUSED if "\n" not in text.strip() else Outcome.TRACEBACK), f"{_AtWork.how}\n{text}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        mine = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*mine[-2:], where])
        return Outcome.TRACEBACK, f"{_AtWork.how}\n{type(error).__name__}: {' '.join(str(error).split())[:200]} ({at})"


def _page(seen: list[Variant], seconds: float) -> list[str]:
    counts = Counter((variant.target, variant.outcome) for variant in seen)
    names = dict.fromkeys(variant.target for variant in seen)
    rows = [[name, *(str(counts[name, outcome]) for outcome in Outcome)] for name in names]
    sums = [str(sum(counts[name, outcome] for name in names)) for outcome in Outcome]
    return [
        "# Damaged files",
        "",
        f"{len(seen)} variants of {len(names)} kinds of files, {seconds:.0f} s on {machine()}.",
        "",
        *markdown_table(["what was damaged", *Outcome], [*rows, ["all", *sums]]),
        "",
        "Refused: one line for the user. Made again: the result of the undamaged file. Another: a user's own file that",
        "was another valid one. The last four are faults.",
        "",
        f"    {command_line()}",
    ]


if __name__ == "__main__":
    typer.run(main)
