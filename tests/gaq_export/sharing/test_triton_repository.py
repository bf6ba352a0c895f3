"""A model repository for Triton: its config by the server's own schema, its client against the server's protocol."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from google.protobuf import json_format, text_format
from PIL import Image
from typer.testing import CliRunner

import engines
from engines import Audit, EngineConfig, EngineFile, TensorSpec
from gaq_export import pipeline
from gaq_export.cli.app import app
from gaq_export.diffusion.conditioning import Conditioning, class_conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.graph.step import FEEDBACK
from gaq_export.models.loader import LoadedModel
from gaq_export.sharing import triton_client, triton_repository
from gaq_export.sharing.triton_repository import ServingOptions

SPEC = SamplerSpec(steps=4, eta=0.5)


def read_schema() -> ModuleType:
    """Return Triton's own description of a model's config; its package would ask for more than is installed."""
    path = importlib.metadata.distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    return read_schema()


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
    for condition, has in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in condition] == [value.name for value in has]
        for tensor, value in zip(condition, has, strict=True):
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


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model as a server has it: its config, what runs it, and the sizes of the batches it was asked for."""

    config: Any
    session: onnxruntime.InferenceSession
    batches: list[int] = field(default_factory=list)


class _Server(BaseHTTPRequestHandler):
    """The two answers of a Triton server that the client needs: a model's config, and inference by ONNX Runtime."""

    protocol_version = "HTTP/1.1"
    models: dict[str, Served]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Stay silent."""

    def do_GET(self) -> None:
        config = self.models[self._model("config")].config
        self._answer(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)).encode())

    def do_POST(self) -> None:
        name = self._model("infer")
        model, body = self.models[name], self.rfile.read(int(self.headers["Content-Length"]))
        start = int(self.headers["Inference-Header-Content-Length"])
        request, at, feeds = json.loads(body[:start]), start, {}
        condition = {tensor.name: tensor for tensor in model.config.input}
        kinds = {"FP32": np.float32, "INT64": np.int64}
        for tensor in request["inputs"]:
            own, size = condition.pop(tensor["name"]), tensor["parameters"]["binary_data_size"]
            batch, *inner = tensor["shape"]
            assert 1 <= batch <= model.config.max_batch_size
            assert inner == list(own.dims)
            array = np.frombuffer(body[at : at + size], kinds[tensor["datatype"]])
            shape = list(own.reshape.shape) if own.HasField("reshape") else inner
            feeds[tensor["name"]], at = array.reshape(batch, *shape), at + size
        assert not condition
        model.batches.append(batch)
        asked = [output["name"] for output in request["outputs"]]
        found = dict(zip(asked, model.session.run(asked, feeds), strict=True))
        dims = {tensor.name: list(tensor.dims) for tensor in model.config.output}
        outputs = [
            {
                "name": output,
                "datatype": next(k for k, kind in kinds.items() if array.dtype == kind),
                "shape": [batch, *dims[output]],
                "parameters": {"binary_data_size": array.nbytes},
            }
            for output, array in found.items()
        ]
        head = json.dumps({"model_name": name, "model_version": "1", "outputs": outputs}).encode()
        blobs = b"".join(array.tobytes() for array in found.values())
        self._answer(head + blobs, **{"Inference-Header-Content-Length": str(len(head))})

    def _model(self, asked: str) -> str:
        assert self.path.startswith("/v2/models/")
        name, what = self.path.removeprefix("/v2/models/").split("/")
        assert what == asked
        return name

    def _answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(repository: Path) -> Iterator[tuple[str, dict[str, Served]]]:
    """Serve a repository on this machine, ONNX Runtime running its models; yield the address and the models."""
    schema, models = read_schema(), {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for folder in (repository / "models").iterdir():
        config = _config(schema, (folder / "config.pbtxt").read_text())
        assert config.name == folder.name
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", options)
        models[folder.name] = Served(config=config, session=session)
    handler = type("Server", (_Server,), {"models": models})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", models
        server.shutdown()
        thread.join()


def draw_by_client(repository: Path, out: Path, *words: object) -> None:
    """Run the repository's client as a user does, who has no gaq-export."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = [repository / "client.py", "--out", out, *words]
    subprocess.run([sys.executable, *map(str, given)], check=True, cwd=out.parent, env=environment, timeout=300)


@pytest.fixture(scope="module")
def served(repository: Path) -> Iterator[tuple[str, dict[str, Served]]]:
    with serving(repository) as found:
        yield found


def test_the_client_draws_through_a_server_what_sample_draws(
    repository: Path, served: tuple[str, dict[str, Served]], tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path
) -> None:
    address, models = served
    draw_by_client(repository, tmp_path / "served", "--url", address, "--num", 4, "--seed", 7)
    assert models["unet"].batches == [3] * SPEC.steps + [1] * SPEC.steps
    config = EngineConfig(backend="onnxruntime", threads=1)
    engine = tmp_path / "unet.plan"
    pipeline.build_engine(folder=tiny_run, out=engine, config=config, sampler=SPEC, model=tiny_model)
    pipeline.sample(engine, num=4, seed=7, out=tmp_path / "own")
    for seed in range(7, 11):
        found, expected = (np.array(Image.open(tmp_path / place / f"{seed:06d}.png")) for place in ("served", "own"))
        assert np.array_equal(found, expected)


def test_images_at_different_steps_can_be_in_one_batch(served: tuple[str, dict[str, Served]]) -> None:
    session = served[1]["unet"].session
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
    known = triton_repository._conditioning_facts(class_conditioning((1, 3), unconditional=9, guidance=2.0), None)
    config = _config(schema, triton_repository.config_text("unet", _file(inputs), known))
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", schema.ModelInstanceGroup.KIND_GPU)
    values = {name: json.loads(value.string_value) for name, value in config.parameters.items()}
    assert values == {"classes": [1, 3], "unconditional": 9, "guidance": 2.0}
    rows, unconditional = triton_client._rows(None, values, None, Path())
    assert rows["class_labels"].tolist() == [[1], [3]]
    assert unconditional["class_labels"].tolist() == [[9]]
    assert triton_client.FEEDBACK == FEEDBACK


def test_what_a_server_cannot_have_is_one_line(tiny_run: Path, tiny_model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(GaqError, match=r"no backend for 'openvino'. Choose one of \['onnxruntime', "):
        triton_repository.write(tiny_run, tmp_path / "out", ServingOptions(backend="openvino"))
    if reason := engines.find_backend("tensorrt").can_build():
        with pytest.raises(GaqError, match="tensorrt cannot build here") as caught:
            triton_repository.write(tiny_run, tmp_path / "out", ServingOptions(backend="tensorrt"), model=tiny_model)
        assert reason in str(caught.value)
    condition = Conditioning(names=("a",), rows={"encoder_hidden_states": torch.ones(1, 2, 3)}, unconditional={})
    with pytest.raises(
        GaqError, match=r"is conditioned on \['encoder_hidden_states'\], and there are no text encoders"
    ):
        triton_repository._conditioning_facts(condition, None)
    with pytest.raises(GaqError, match=r"run is there and has no client\.py"):
        triton_repository.write(tiny_run, tiny_run)
    step = (TensorSpec(name="step", dtype="int64", shape=(1,)),)
    with pytest.raises(GaqError, match=r"starts at 2 and has none of \['step'\]"):
        triton_repository.config_text("unet", _file(step, batch=(2, 2, 2)), {})
