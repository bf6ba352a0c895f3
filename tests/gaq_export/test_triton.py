"""A model repository for Triton: its config by the server's own schema, its client against the server's protocol."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from PIL import Image
from typer.testing import CliRunner

import engines
from engines import Audit, EngineConfig, EngineFile, TensorSpec
from gaq_export import pipeline, triton_client, triton_repository
from gaq_export.cli import app
from gaq_export.conditions import classes
from gaq_export.errors import GaqError
from gaq_export.models import LoadedModel
from gaq_export.schedule import SamplerSpec
from gaq_export.stepgraph import FEEDBACK

SPEC = SamplerSpec(steps=4, eta=0.5)


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's own description of a model's config; the package it comes in would ask for more than is installed."""
    path = importlib.metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the tiny run."""
    out = tmp_path_factory.mktemp("triton") / "served"
    words = ("triton", tiny_run, out, "--batch", 3, "--steps", SPEC.steps, "--eta", SPEC.eta)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}; next: tritonserver --model-repository {out / 'models'}\n"
    return out


def _config(schema: ModuleType, text: str) -> Any:
    return text_format.Parse(text, schema.ModelConfig())


def test_the_config_is_one_by_the_servers_schema_and_fits_the_model(schema: ModuleType, repository: Path) -> None:
    folder = repository / "models" / "unet"
    config = _config(schema, (folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("unet", "onnxruntime", 3)
    assert list(config.dynamic_batching.preferred_batch_size) == [3]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert [path.name for path in (folder / "1").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    types = {"tensor(float)": schema.TYPE_FP32, "tensor(int64)": schema.TYPE_INT64}
    for told, has in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in told] == [value.name for value in has]
        for tensor, value in zip(told, has, strict=True):
            assert isinstance(value.shape[0], str)  # a batch, of which the config does not tell
            inner = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            assert inner == value.shape[1:]
            assert tensor.data_type == types[value.type]
    assert {tensor.name: list(tensor.dims) for tensor in config.input} == {
        "x": [1, 16, 16],
        "step": [1],
        "noise": [1, 16, 16],
    }
    assert config.parameters["steps"].string_value == str(SPEC.steps)


class _Server(BaseHTTPRequestHandler):
    """The two answers of a Triton server that the client needs: a model's config, and inference by ONNX Runtime."""

    protocol_version = "HTTP/1.1"
    config: Any
    session: onnxruntime.InferenceSession
    batches: list[int]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Stay silent."""

    def do_GET(self) -> None:
        assert self.path == "/v2/models/unet/config"
        self._answer(json.dumps(json_format.MessageToDict(self.config, preserving_proto_field_name=True)).encode())

    def do_POST(self) -> None:
        assert self.path == "/v2/models/unet/infer"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        start = int(self.headers["Inference-Header-Content-Length"])
        request, at, feeds = json.loads(body[:start]), start, {}
        told = {tensor.name: tensor for tensor in self.config.input}
        kinds = {"FP32": np.float32, "INT64": np.int64}
        for tensor in request["inputs"]:
            own, size = told.pop(tensor["name"]), tensor["parameters"]["binary_data_size"]
            batch, *inner = tensor["shape"]
            assert 1 <= batch <= self.config.max_batch_size
            assert inner == list(own.dims)
            array = np.frombuffer(body[at : at + size], kinds[tensor["datatype"]])
            shape = list(own.reshape.shape) if own.HasField("reshape") else inner
            feeds[tensor["name"]], at = array.reshape(batch, *shape), at + size
        assert not told
        self.batches.append(batch)
        asked = [output["name"] for output in request["outputs"]]
        found = dict(zip(asked, self.session.run(asked, feeds), strict=True))
        dims = {tensor.name: list(tensor.dims) for tensor in self.config.output}
        outputs = [
            {
                "name": name,
                "datatype": next(k for k, kind in kinds.items() if array.dtype == kind),
                "shape": [batch, *dims[name]],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in found.items()
        ]
        head = json.dumps({"model_name": "unet", "model_version": "1", "outputs": outputs}).encode()
        blobs = b"".join(array.tobytes() for array in found.values())
        self._answer(head + blobs, **{"Inference-Header-Content-Length": str(len(head))})

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def served(schema: ModuleType, repository: Path) -> Iterator[tuple[str, type[_Server]]]:
    """Address of a server on this machine with the repository's model, which ONNX Runtime runs, and its record."""
    folder = repository / "models" / "unet"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options)
    config = _config(schema, (folder / "config.pbtxt").read_text())
    handler = type("Server", (_Server,), {"config": config, "session": session, "batches": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_the_client_draws_through_a_server_what_sample_draws(
    repository: Path, served: tuple[str, type[_Server]], tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    address, record = served
    words = [repository / "client.py", "--url", address, "--num", 4, "--seed", 7, "--out", tmp_path / "served"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=tmp_path, env=environment, timeout=300)
    assert record.batches == [3] * SPEC.steps + [1] * SPEC.steps
    config = EngineConfig(backend="onnxruntime", threads=1)
    engine = tmp_path / "unet.plan"
    pipeline.build_engine(folder=tiny_run, out=engine, config=config, sampler=SPEC, model=tiny_model)
    pipeline.sample(engine, num=4, seed=7, out=tmp_path / "own")
    for seed in range(7, 11):
        found, expected = (np.array(Image.open(tmp_path / place / f"{seed:06d}.png")) for place in ("served", "own"))
        assert np.array_equal(found, expected)


def test_images_at_different_steps_can_be_in_one_batch(served: tuple[str, type[_Server]]) -> None:
    session = served[1].session
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((2, 1, 16, 16), np.float32) for name in ("x", "noise")}
    steps = np.array([3, 1])
    together = session.run(["x_next", "step_next"], {**feeds, "step": steps})
    for i, step in enumerate(steps):
        alone = session.run(["x_next"], {n: a[i : i + 1] for n, a in feeds.items()} | {"step": steps[i : i + 1]})[0]
        np.testing.assert_allclose(together[0][i : i + 1], alone, atol=1e-5)
        assert together[1][i] == step + 1


def _file(inputs: tuple[TensorSpec, ...], **fields: Any) -> EngineFile:
    x = TensorSpec(name="x_next", dtype="float32", shape=(None, 4, 8, 8))
    audit = Audit(kernels=(), weight_bytes={})
    given = {"backend": "tensorrt", "batch": (1, 4, 8), **fields}
    return EngineFile(path=Path("e"), inputs=inputs, outputs=(x,), sha256="", audit=audit, build_seconds=0.0, **given)


def test_a_tensorrt_plan_with_guidance_has_a_config_too(schema: ModuleType) -> None:
    inputs = (
        TensorSpec(name="x", dtype="float32", shape=(None, 4, 8, 8)),
        TensorSpec(name="class_labels", dtype="int64", shape=(None,)),
        TensorSpec(name="guidance", dtype="float32", shape=(None,)),
    )
    known = triton_repository._told(classes((1, 3), nothing=9, guidance=2.0))
    config = _config(schema, triton_repository.config_text("unet", _file(inputs), known))
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", schema.ModelInstanceGroup.KIND_GPU)
    values = {name: json.loads(value.string_value) for name, value in config.parameters.items()}
    assert values == {"classes": [1, 3], "nothing": 9, "guidance": 2.0}
    shapes = {tensor.name: (2, *tensor.dims) for tensor in config.input}
    feeds = triton_client._first(values, shapes, (4, 5), None)
    assert feeds["class_labels"].tolist() == [[1], [3]]
    assert feeds["nothing_class_labels"].tolist() == [[9], [9]]
    assert feeds["guidance"].tolist() == [[2.0], [2.0]]
    assert triton_client.FEEDBACK == FEEDBACK


def test_what_a_server_cannot_have_is_one_line(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"no backend for 'openvino'. Choose one of \['onnxruntime', "):
        triton_repository.write(tiny_run, tmp_path / "out", backend="openvino")
    if reason := engines.find_backend("tensorrt").can_build():
        with pytest.raises(GaqError, match="tensorrt cannot build here") as caught:
            triton_repository.write(tiny_run, tmp_path / "out", backend="tensorrt", model=tiny_model)
        assert reason in str(caught.value)
    with pytest.raises(GaqError, match=r"run is there and has no client\.py"):
        triton_repository.write(tiny_run, tiny_run)
    step = (TensorSpec(name="step", dtype="int64", shape=(1,)),)
    with pytest.raises(GaqError, match=r"starts at 2 and has none of \['step'\]"):
        triton_repository.config_text("unet", _file(step, batch=(2, 2, 2)), {})
