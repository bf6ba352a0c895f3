"""What `gpu_check` and the processes of its stages hand each other: a request one way, findings the other.

Both are files of JSON. Findings are appended line by line, so that a process that is cut off leaves what it had found.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from traceback import print_exc
from typing import Any

GPU_BACKENDS = {
    "tensorrt": ("float16", "bfloat16", "float32"),
    "tensorrt-rtx": ("float16", "bfloat16", "float32"),
    "onnxruntime-cuda": ("float16", "float32"),
}
ENGINE = "engine "  # begins the name of an engine's stage, "engine tensorrt/float16"
PYTORCH = "pytorch/float32"  # what engines are timed against


class NotRun(Exception):
    """A stage cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every stage is asked.

    Attributes:
        model: of the calibration and the pictures.
        weights: of that model, as `load_model` takes them; None for those that go with its name.
        small: the bundled model, for what has to be calibrated several times and for engines.
        folder: for the run folders of all stages.
        device: as `find_device` takes it.
        tf32: whether products of the pictures may be rounded to TensorFloat-32.
        preset: of the calibrations.
        steps: of DDIM, for the pictures and the engines; None in `calibration_steps` means the model's own sampler.
        calibration_steps: of the calibrations, likewise.
        images: at most, of each network.
        batch: of the pictures.
        engine_batch: of the engines.
        seconds: that the stage has.
        cpu_plan: a plan of the same calibration by a CPU, None if there is none.
        data: real images for the Frechet distance, None for none.
        classifier: a ResNet-56 for CIFAR-10, None for none.
    """

    model: str = "ddpm-mnist"
    weights: str | None = None
    small: str = "ddpm-mnist"
    folder: str
    device: str = "cuda"
    tf32: bool = False
    preset: str = "fast"
    steps: int = 20
    calibration_steps: int | None = None
    images: int = 10_000
    batch: int = 250
    engine_batch: int = 16
    seconds: float = 480.0
    cpu_plan: str | None = None
    data: str | None = None
    classifier: str | None = None

    @property
    def digits(self) -> bool:
        """Whether the pictures are digits, for which the package has a classifier."""
        return self.model.startswith("ddpm-mnist")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of a stage.

    Attributes:
        part: what was done; a later finding about the same part takes the place of an earlier one.
        facts: what came out, JSON values by name.
        failed: why nothing did; None if something did.
    """

    part: str
    facts: Mapping[str, Any]
    failed: str | None = None


Report = Callable[[Finding], None]


@contextmanager
def attempt(part: str, report: Report) -> Iterator[dict[str, Any]]:
    """Give a table for the facts of a part, and report it at the end; what the part raises is reported instead."""
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:  # whatever it is, the next part can still be done
        print_exc()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        report(Finding(part=part, facts=facts, failed=reason))
    else:
        report(Finding(part=part, facts=facts))


def append_finding(path: Path, finding: Finding) -> None:
    """Add a line to a file of findings."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(replace(finding, facts=_jsonable(finding.facts)))) + "\n")


def read_findings(path: Path) -> tuple[Finding, ...]:
    """Return the last finding about each part, in the order in which they came; none if there is no file."""
    if not path.exists():
        return ()
    # The last line may be half written.
    lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    found = {one["part"]: Finding(**one) for one in map(json.loads, lines)}
    return tuple(found.values())


def write_request(path: Path, request: Request) -> None:
    """Write a request to a file."""
    path.write_text(json.dumps(asdict(request)), encoding="utf-8")


def read_request(path: Path) -> Request:
    """Return the request in a file."""
    return Request(**json.loads(path.read_text(encoding="utf-8")))


def _jsonable(value: Any) -> Any:
    """Return a value that JSON can hold: it has no infinities."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
