"""The child process gives TensorRT what the job says, on a stand-in that writes down what it was given."""

import json
import sys
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.nvinfer_child import ERROR_MARK, Job, build_engine, main, make_logger


class _Recorder:
    """A TensorRT module with one dynamic and one fixed input, whose layer list only the inspector has."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.capabilities: list[tuple[str, int]] = []
        self.shapes: dict[str, tuple[Any, ...]] = {}
        self.ILogger = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)})
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
        self.BuilderFlag = SimpleNamespace(STRIP_PLAN="strip", REQUIRE_USER_ALLOCATION="no allocation")
        self.ComputeCapability = SimpleNamespace(SM86="86", SM89="89")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.Builder = self._builder
        self.OnnxParser = self._parser
        self.Runtime = self._runtime
        self.LayerInformationFormat = SimpleNamespace(ONELINE="lines")

    def _builder(self, logger: Any) -> Any:
        inputs = [SimpleNamespace(name="x", shape=(-1, 3, 8, 8)), SimpleNamespace(name="step", shape=(1,))]

        def create_network(flags: int) -> Any:
            assert flags == 1 << 3
            return SimpleNamespace(num_inputs=2, get_input=inputs.__getitem__)

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: SimpleNamespace(
                set_flag=self.flags.append,
                set_compute_capability=lambda name, index: self.capabilities.append((name, index)),
                add_optimization_profile=lambda profile: self.flags.append("profile"),
            ),
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda name, *shapes: self.shapes.update({name: shapes})
            ),
            build_serialized_network=lambda network, config: b"engine",
        )

    def _parser(self, network: Any, logger: Any) -> Any:
        return SimpleNamespace(parse=lambda content, beside: (content, beside) == (b"onnx", "/weights/here"))

    def _runtime(self, logger: Any) -> Any:
        inspector = SimpleNamespace(get_engine_information=lambda form: f"Name: a layer, as {form}")
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        return SimpleNamespace(deserialize_cuda_engine=lambda content: engine)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    return Job(
        module="recorder",
        onnx=str(tmp_path / "model.onnx"),
        beside="/weights/here",
        engine=str(tmp_path / "unet.plan"),
        log=str(tmp_path / "build.log"),
        batch=(1, 4, 16),
        targets=(),
        stripped=False,
    )


def test_batch_targets_and_flags_reach_the_builder(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = _Recorder()
    monkeypatch.setitem(sys.modules, "recorder", trt)  # type: ignore[arg-type]
    job = replace(job, targets=("sm86", "sm89"), stripped=True)
    monkeypatch.setattr(sys, "argv", ["nvinfer_child", json.dumps(asdict(job))])
    assert main() == 0
    assert Path(job.engine).read_bytes() == b"engine"
    assert trt.shapes == {"x": ((1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)), "step": ((1,), (1,), (1,))}
    assert trt.flags == ["no allocation", "strip", "profile"]
    assert trt.capabilities == [("86", 0), ("89", 1)]
    assert Path(job.log).read_text() == "Layers:\nName: a layer, as lines"


def test_a_portable_engine_is_built_for_all_and_may_bring_code(job: Job) -> None:
    trt = _Recorder()
    config = SimpleNamespace(
        set_flag=trt.flags.append, add_optimization_profile=lambda profile: None, hardware_compatibility_level="none"
    )
    builder = trt.Builder(None)
    builder.create_builder_config = lambda: config
    trt.Builder = lambda logger: builder
    trt.BuilderFlag = SimpleNamespace(VERSION_COMPATIBLE="version")
    trt.HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere and later")
    runtimes = [SimpleNamespace(deserialize_cuda_engine=trt.Runtime(None).deserialize_cuda_engine)]
    trt.Runtime = lambda logger: runtimes[0]
    Path(job.log).touch()
    assert build_engine(trt, replace(job, portable=("version", "gpu")), StringIO())
    assert (trt.flags, config.hardware_compatibility_level) == (["version"], "ampere and later")
    assert runtimes[0].engine_host_code_allowed


def test_a_builder_that_gives_nothing_is_a_failure(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = _Recorder()
    builder = trt.Builder(None)
    builder.build_serialized_network = lambda network, config: None
    monkeypatch.setattr(trt, "Builder", lambda logger: builder)
    assert not build_engine(trt, job, StringIO())
    assert not Path(job.engine).exists()


def test_errors_are_marked_in_the_log() -> None:
    log = StringIO()
    logger = make_logger(_Recorder(), log)
    logger.log(5, "timing kernels")
    logger.log(1, "no kernel")
    assert log.getvalue() == f"timing kernels\n{ERROR_MARK}no kernel\n"
