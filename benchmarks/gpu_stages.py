"""The stages of `gpu_check`, each in a process of its own.

    python benchmarks/gpu_stages.py STAGE REQUEST FINDINGS

In: a file with a `Request`. Out: findings, a line each as they come. Exit code 3 means that the stage cannot run here,
for the reason in the last line.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from gpu_records import (
    ENGINE,
    PYTORCH,
    Finding,
    NotRun,
    Report,
    Request,
    append_finding,
    read_findings,
    read_request,
    write_request,
)

ROOT = Path(__file__).resolve().parents[1]
LOOP_TESTS = ROOT / "tests" / "engines" / "test_cuda_driver.py"
CANNOT = 3  # exit code
TWIN = "cpu-twin"  # the small model's calibration on the CPU, in a process beside the GPU's


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: its title on the page, its share of the time, and what it does."""

    title: str
    share: float
    run: Callable[[Request, Report], None]


def calibration(request: Request, report: Report) -> None:
    """Calibrate the large model on the device, judge the plan, and compare its codes with a CPU's."""
    import gpu_calibration

    gpu_calibration.calibrate_large(request, report)


def same_numbers(request: Request, report: Report) -> None:
    """Calibrate the small model on the device twice, kernel by kernel, and on the CPU meanwhile."""
    import gpu_calibration

    own = Path(request.folder, "twin")
    own.mkdir(parents=True, exist_ok=True)
    write_request(own / "request.json", replace(request, device="cpu"))
    findings = own / "findings"
    # Two processors stay free for the process that keeps the GPU busy.
    threads = max(1, (os.cpu_count() or 1) - 2)
    twin = subprocess.Popen(
        [sys.executable, __file__, TWIN, own / "request.json", findings],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        gpu_calibration.calibrate_again(request, report)
        twin.wait()
    finally:
        twin.kill()
    for finding in read_findings(findings):
        report(finding)
    gpu_calibration.compare_with_twin(request, report)


def cpu_twin(request: Request, report: Report) -> None:
    """Calibrate the small model on the CPU."""
    import gpu_calibration

    gpu_calibration.calibrate_twin(request, report)


def pictures(request: Request, report: Report) -> None:
    """Draw with the float network and with quantized ones, and compare the images."""
    import gpu_pictures

    gpu_pictures.draw_all(request, report)


def loop_tests(request: Request, report: Report) -> None:
    """Run the tests of the loop on a GPU, with a stand-in for the network."""
    results = Path(request.folder, "loop-tests.xml")
    # No conftest: it needs packages that only the other tests do. Warnings of newer packages are no failures here.
    options = ("-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-W", "default", "-q", "-rs")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={results}", str(LOOP_TESTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(child.stdout, child.stderr)
    if not results.exists():
        last = (child.stderr.strip().splitlines() or child.stdout.strip().splitlines() or ["it printed nothing"])[-1]
        raise NotRun(f"pytest could not run the tests: {last}")
    report_tests(results.read_text(encoding="utf-8"), report)


def report_tests(xml: str, report: Report) -> None:
    """Report the tests in pytest's XML, each with the properties that it recorded.

    Raises:
        NotRun: All of them were skipped.
    """
    # Of pytest, which we started.
    cases = list(ET.fromstring(xml).iter("testcase"))
    skips = [skip.get("message", "") for case in cases for skip in case.iter("skipped")]
    if cases and len(skips) == len(cases):
        raise NotRun("; ".join(dict.fromkeys(re.sub(r"^Skipped: ", "", skip) for skip in skips)))
    for case in cases:
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        failure = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        leave_out = case.find("skipped")
        facts: dict[str, Any] = {p.get("name", ""): _number(p.get("value", "")) for p in case.iter("property")}
        if failure is not None:
            report(Finding(part=name, facts=facts, failed=" ".join(failure.get("message", "").split())[:300]))
        elif leave_out is not None:
            report(Finding(part=name, facts={"result": f"skipped: {leave_out.get('message')}"}))
        else:
            report(Finding(part=name, facts={"result": "passed", **facts}))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def engine(kind: str, request: Request, report: Report) -> None:
    """Build, check and time one engine, "backend/type", or PyTorch in its place."""
    import gpu_engines

    gpu_engines.report_engine(kind, request, report)


STAGES: Mapping[str, Stage] = {
    "calibration": Stage(title="Calibration", share=0.35, run=calibration),
    "same-numbers": Stage(title="The same numbers again, and on the CPU", share=0.25, run=same_numbers),
    "pictures": Stage(title="Pictures of the fake-quantized network", share=0.23, run=pictures),
    "loop": Stage(title="Our loop, with a stand-in for the network", share=0.05, run=loop_tests),
}
ENGINES_SHARE = 0.12  # of the time, for all engines together


def engine_stages(kinds: Sequence[str]) -> dict[str, Stage]:
    """Return a stage for PyTorch and for each engine, by name."""
    kinds = (PYTORCH, *kinds)
    return {
        f"{ENGINE}{kind}": Stage(
            title=f"Engine {kind}", share=ENGINES_SHARE / len(kinds), run=functools.partial(engine, kind)
        )
        for kind in kinds
    }


def main(name: str, request: Path, findings: Path) -> int:
    """Run one stage; return the exit code."""
    stage: Callable[[Request, Report], None]
    if name == TWIN:
        stage = cpu_twin
    elif name.startswith(ENGINE):
        stage = functools.partial(engine, name.removeprefix(ENGINE))
    else:
        stage = STAGES[name].run
    try:
        stage(read_request(request), functools.partial(append_finding, findings))
    except NotRun as reason:
        print(reason, file=sys.stderr)
        return CANNOT
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
