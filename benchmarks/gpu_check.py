"""Prove the GPU work on a machine with an NVIDIA GPU, stage by stage, in a few minutes.

    make gpu-check

Each stage is a process with a limit of time; a stage that fails, crashes or is cut off never stops the next one. The
page and the JSON beside it are written anew after every result. Without a GPU nothing is run, and a page
is written only to `--out`; `--rehearse` runs the code of every stage on the CPU, at a size at which the numbers mean
nothing.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from calib.files import write_atomically
from command import command_line, one_line_errors
from engines.driver import gpus, no_gpu
from engines.machine import inspect_machine
from gaq_export.errors import GaqError
from gaq_export.report.markdown import markdown_table, plain
from gpu_records import ENGINE, GPU_BACKENDS, Finding, Request, read_findings, write_request
from gpu_stages import CANNOT, ROOT, STAGES, Stage, engine_stages

SCRIPT = Path(__file__).with_name("gpu_stages.py")
POLL = 0.2  # seconds
MARGIN = 5.0  # seconds that a stage is not told of: for its process to start and to end
LEAST = 3.0  # seconds; with less a stage is not begun
ENGINE_SECONDS = 120.0  # at most, for one engine
TAIL = 300  # characters of what a process said last
STANDS_IN = "ddpm-mnist"


class Status(StrEnum):
    """How a stage ended."""

    DONE = "done"
    NOT_RUN = "not run"
    FAILED = "failed"
    CUT_OFF = "cut off"


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a stage ended, after how many seconds, why, and what it found."""

    title: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def line(self) -> str:
        """Its status in a line."""
        return f"{self.status}: {self.reason}" if self.reason else f"{self.status} in {self.seconds:.0f} s"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is the same for all stages: the machine, the request, notes for the page, where to write."""

    machine: str
    request: Request
    notes: tuple[str, ...]
    out: Path
    stages: Mapping[str, Stage]


def main(
    minutes: Annotated[float, typer.Option(help="For all stages together.")] = 8.0,
    model: Annotated[str, typer.Option(help="Of the calibration and the pictures.")] = "ddpm-cifar10",
    weights: Annotated[str | None, typer.Option(help="As for gaq-export calibrate.")] = None,
    cpu_plan: Annotated[Path | None, typer.Option(help="plan.safetensors of the same calibration by a CPU.")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz of real test images, for the Frechet distance.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="ResNet-56 of akamaster/pytorch_resnet_cifar10.")] = None,
    images: Annotated[int, typer.Option(help="At most, of each network.")] = 10_000,
    tf32: Annotated[bool, typer.Option(help="Draw the pictures with products in TensorFloat-32.")] = False,
    only: Annotated[str, typer.Option(help="Stages whose names begin so, separated by commas.")] = "",
    out: Annotated[Path | None, typer.Option(help="Page; docs/results/gpu-<name>.md by default.")] = None,
    rehearse: Annotated[bool, typer.Option(help="Run every stage on the CPU, at a tiny size.")] = False,
) -> None:
    """Run all stages here and write the page; without a GPU say so."""
    with one_line_errors():
        stages = _chosen(only, ["openvino/float32", "tensorrt/float32"] if rehearse else _kinds())
        reason = None if rehearse else no_gpu()
        if reason is not None:
            print(f"gpu-check: not run: {reason}")
            for stage in stages.values():
                print(f"{stage.title}: not run")
            if out is not None:  # without it nothing is written, so that no checkout is changed
                request = Request(model=model, weights=weights, folder="", images=images, tf32=tf32)
                check = Check(machine=_machine(), request=request, notes=(), out=out, stages=stages)
                write(
                    check, {n: Result(title=s.title, status=Status.NOT_RUN, reason=reason) for n, s in stages.items()}
                )
            return
        model, weights, notes = _known_model(STANDS_IN if rehearse and weights is None else model, weights)
        with tempfile.TemporaryDirectory() as scratch:
            request = Request(
                model=model,
                weights=weights,
                folder=scratch,
                images=images,
                tf32=tf32,
                cpu_plan=_file(cpu_plan),
                data=_file(data),
                classifier=_file(classifier),
            )
            if rehearse:
                request = replace(request, device="cpu", preset="tiny", steps=3, calibration_steps=3)
                request = replace(request, images=8, batch=4, engine_batch=2)
                notes = (*notes, "A rehearsal on the CPU: the numbers mean nothing.")
                out = out or Path(tempfile.gettempdir(), "gpu-check-rehearsal.md")
            name = "cpu" if rehearse else gpus()[0].name
            page = out or ROOT / "docs" / "results" / f"gpu-{name.lower().replace(' ', '-')}.md"
            check = Check(machine=_machine(), request=request, notes=notes, out=page, stages=stages)
            run_all(check, 60 * minutes)
    print(f"written: {page} and {page.with_suffix('.json').name}")


def run_all(check: Check, seconds: float) -> dict[str, Result]:
    """Run the stages one after another; what a stage leaves of its time goes to the others."""
    ends = time.monotonic() + seconds
    results: dict[str, Result] = {}
    waiting = dict(check.stages)
    write(check, results)
    for name, stage in check.stages.items():
        left = ends - time.monotonic()
        limit = left * stage.share / sum(one.share for one in waiting.values())
        if name.startswith(ENGINE):
            limit = min(left, ENGINE_SECONDS)  # they differ much; whichever comes first is the more important one
        del waiting[name]
        if limit < LEAST:
            results[name] = Result(title=stage.title, status=Status.NOT_RUN, reason="no time was left")
        else:
            print(f"{name}: begun, at most {limit:.0f} s", flush=True)
            partial = Result(title=stage.title, status=Status.CUT_OFF, reason="it has not ended yet")

            def on_findings(found: tuple[Finding, ...], name: str = name, partial: Result = partial) -> None:
                write(check, {**results, name: replace(partial, findings=found)})

            results[name] = run_stage(name, stage, check.request, limit, on_findings)
        print(f"{name}: {results[name].line}", flush=True)
        write(check, results)
    return results


def run_stage(
    name: str, stage: Stage, request: Request, limit: float, on_findings: Callable[[tuple[Finding, ...]], None]
) -> Result:
    """Run one stage in a process.

    Args:
        name: of the stage.
        stage: the stage.
        request: what it is asked.
        limit: seconds after which it is killed.
        on_findings: called with all findings whenever there is a new one.
    """
    folder = Path(request.folder, name.replace("/", "-"))
    folder.mkdir(parents=True)
    asked, found, log = folder / "request.json", folder / "findings", folder / "log"
    write_request(asked, replace(request, seconds=max(1.0, limit - MARGIN)))
    started = time.monotonic()
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, SCRIPT, name, asked, found],
            env=_environment(name),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the processes that it starts end with it
        )
        seen: tuple[Finding, ...] = ()
        try:
            while child.poll() is None and time.monotonic() - started < limit:
                time.sleep(POLL)
                if (findings := read_findings(found)) != seen:
                    seen = findings
                    on_findings(seen)
            cut_off = child.poll() is None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    result = Result(
        title=stage.title,
        status=Status.DONE,
        seconds=round(time.monotonic() - started, 1),
        findings=read_findings(found),
    )
    if cut_off:
        return replace(result, status=Status.CUT_OFF, reason=f"it had {limit:.0f} s")
    if child.returncode == CANNOT:
        return replace(result, status=Status.NOT_RUN, reason=_last_line(log))
    if child.returncode:
        reason = f"the process ended with {child.returncode}: {_last_line(log)}"
        return replace(result, status=Status.FAILED, reason=reason)
    failures = sum(one.failed is not None for one in result.findings)
    if failures:
        reason = f"{failures} of {len(result.findings)} parts failed"
        return replace(result, status=Status.FAILED, reason=reason)
    return result


def write(check: Check, results: Mapping[str, Result]) -> None:
    """Write the page and the JSON beside it."""
    record = {
        "command": command_line(),
        "machine": check.machine,
        "notes": check.notes,
        "request": {k: v for k, v in asdict(check.request).items() if k not in ("folder", "seconds")},
        "stages": {name: asdict(result) for name, result in results.items()},
    }
    write_atomically(check.out.with_suffix(".json"), json.dumps(record, indent=1).encode())
    write_atomically(check.out, ("\n".join(page(check, results)) + "\n").encode())


def page(check: Check, results: Mapping[str, Result]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from (f"# {check.out.stem}", "", f"`{command_line()}` on {plain(check.machine)}.", "")
    for note in check.notes:
        yield from (plain(note), "")
    rows = [(stage.title, plain(results[n].line) if n in results else "not yet") for n, stage in check.stages.items()]
    yield from markdown_table(("stage", "result"), rows)
    for name, result in results.items():
        if result.findings and not name.startswith(ENGINE):
            yield from ("", f"## {result.title}", "")
            yield from markdown_table(("part", "what", "value"), [row for one in result.findings for row in _rows(one)])
    found = [one for name, result in results.items() if name.startswith(ENGINE) for one in result.findings]
    if found:
        import gpu_engines

        yield from ("", "## Engines", "", *gpu_engines.page(found, check.request.engine_batch))


def _rows(finding: Finding) -> Iterator[tuple[str, str, str]]:
    part = plain(finding.part)
    for name, value in finding.facts.items():
        if value is not None and not isinstance(value, dict):  # of every layer, say: in the JSON alone
            yield part, plain(name), _text(value)
            part = ""  # said once
    if finding.failed is not None:
        yield part, "**failed**", plain(finding.failed)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else plain(str(value))


def _kinds() -> list[str]:
    """Return the engines, "backend/type": each backend's default type first, then the other types."""
    kinds = [(rank, backend, c) for backend, computes in GPU_BACKENDS.items() for rank, c in enumerate(computes)]
    return [f"{backend}/{compute}" for _, backend, compute in sorted(kinds, key=lambda kind: kind[0])]


def _chosen(only: str, kinds: list[str]) -> dict[str, Stage]:
    stages = {**STAGES, **engine_stages(kinds)}
    starts = tuple(filter(None, only.split(",")))
    chosen = {name: stage for name, stage in stages.items() if not starts or name.startswith(starts)}
    if not chosen:
        raise GaqError(f"Found no stage that begins with {only!r}. Choose some of {list(stages)}.")
    return chosen


def _known_model(model: str, weights: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Return a model whose weights are on this machine, its weights, and a note if it stands in for another."""
    models = os.environ.get("GAQ_EXPORT_MODELS")
    if model == STANDS_IN or weights is not None or (models and Path(models, model).expanduser().is_dir()):
        return model, weights, ()
    note = f"{STANDS_IN} stands in for {model}, whose weights are not here: GAQ_EXPORT_MODELS names no folder of them."
    return STANDS_IN, None, (note,)


def _file(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise GaqError(f"{path} is not there.")
    return str(path.resolve())  # stages run in other folders


def _environment(name: str) -> dict[str, str]:
    """Return the environment of a stage: as here, and this checkout is found where it is not installed."""
    others = filter(None, [os.environ.get("PYTHONPATH")])
    found = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPT.parent), *others])}
    rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"} if name.startswith(f"{ENGINE}tensorrt-rtx") else {}
    return {**os.environ, **found, **rtx}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1][:TAIL]


def _machine() -> str:
    machine = inspect_machine()
    cards = [
        f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_bytes / 2**30:.0f} GiB, CUDA {gpu.cuda}"
        for gpu in machine.gpus[:1]
    ]
    packages = [f"{name} {version}" for name, version in machine.packages.items() if version]
    python = f"Python {sys.version.split()[0]}"
    return "; ".join([*cards, f"{machine.processor}, {os.cpu_count()} threads", ", ".join([python, *packages])])


if __name__ == "__main__":
    # So that a stage ends with this process when that is asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    typer.run(main)
