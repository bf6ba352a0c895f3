"""Engines of all backends agree with an independent reference, say what they run, and refuse what they cannot do.

This goes through `engines.build` and `engines.open_engine`, and so through `onnx_runtime` and `openvino_cpu` as well.
"""

import errno
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from engines import BACKENDS, EngineConfig, EngineError, best_backend, build, load_engine_file, open_engine
from engines.machine import int8_sums_overflow
from tests.engines.conftest import Graph

CPU_BACKENDS = ["openvino", "onnxruntime"]
GPU_BACKENDS = ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]


def make(onnx_path, backend, **config):
    return build(onnx_path, onnx_path.parent / backend / "unet.plan", EngineConfig(backend=backend, **config))


@pytest.mark.parametrize(
    ("backend", "optimisation"), [("openvino", "all"), ("onnxruntime", "all"), ("onnxruntime", "basic")]
)
def test_a_float_engine_agrees_with_the_onnx_reference(tiny_onnx, feeds, backend, optimisation):
    path = tiny_onnx("float")
    reference = ReferenceEvaluator(onnx.load(path))
    with open_engine(make(path, backend, optimisation=optimisation)) as engine:
        for batch in (1, 3, 16):
            (expected,) = reference.run(None, feeds(batch))
            np.testing.assert_allclose(engine(feeds(batch))["eps"], expected, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("form", ["int8", "int4cast"])
def test_a_quantized_engine_agrees_with_the_onnx_reference(tiny_onnx, feeds, backend, form):
    path = tiny_onnx(form)
    (expected,) = ReferenceEvaluator(onnx.load(tiny_onnx("int8"))).run(None, feeds(4))
    with open_engine(make(path, backend, threads=1)) as engine:
        np.testing.assert_allclose(engine(feeds(4))["eps"], expected, atol=1e-4)


@pytest.mark.parametrize(("largest", "exact"), [(63, True), (127, not int8_sums_overflow())])
def test_sums_of_bytes_overflow_where_the_machine_is_said_to_and_only_with_8_bit_weights(tmp_path, largest, exact):
    graph, rng = Graph(), np.random.default_rng(0)
    codes = graph.constant("codes", rng.integers(-largest, largest + 1, (16, 16, 3, 3)).astype(np.int8))
    weight = graph.add("DequantizeLinear", [codes, graph.constant("scale", np.full(16, 0.01, np.float32))], "w", axis=0)
    graph.add("Conv", [graph.quantized("x"), weight], "y", pads=[1] * 4)
    image = (onnx.TensorProto.FLOAT, ["batch", 16, 8, 8])
    onnx.save(graph.model({"x": image}, {"y": image}), tmp_path / "graph.onnx")
    x = 2.5 * rng.standard_normal((1, 16, 8, 8)).astype(np.float32)
    (expected,) = ReferenceEvaluator(onnx.load(tmp_path / "graph.onnx")).run(None, {"x": x})
    with open_engine(make(tmp_path / "graph.onnx", "openvino", threads=1)) as engine:
        assert np.allclose(engine({"x": x})["y"], expected, atol=1e-3) == exact


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_gpu_engine_agrees_with_the_onnx_reference(tiny_onnx, feeds, backend):
    if reason := BACKENDS[backend].can_build() or BACKENDS[backend].can_run():
        pytest.skip(reason)
    (expected,) = ReferenceEvaluator(onnx.load(tiny_onnx("int8"))).run(None, feeds(4))
    with open_engine(make(tiny_onnx("int4cast"), backend)) as engine:
        np.testing.assert_allclose(engine(feeds(4))["eps"], expected, atol=1e-2)


def test_the_int4_cast_form_is_bit_identical_to_the_int8_form_and_runs_int8_in_openvino(tiny_onnx, feeds):
    results, held = {}, {}
    for form in ("int4cast", "int8"):
        file = make(tiny_onnx(form), "openvino")
        assert file.audit.counts == {("convolution", "float32"): 1, ("convolution", "int8"): 1, ("matmul", "int8"): 1}
        held[form] = file.audit.weight_bytes
        with open_engine(file) as engine:
            results[form] = engine(feeds(4))["eps"]
    np.testing.assert_array_equal(results["int4cast"], results["int8"])
    codes = 16 * 16 * 9 + 16 * 16
    assert held["int4cast"]["int4"] == codes // 2
    assert held["int8"]["int8"] == codes + 2, "the codes and two activation zero points"


def test_onnxruntime_runs_a_convolution_in_int8_only_if_its_output_is_quantized(tiny_onnx):
    without = make(tiny_onnx("int8"), "onnxruntime").audit.counts
    assert without == {("convolution", "float32"): 2, ("matmul", "int8"): 1}
    with_output = make(tiny_onnx("int8", quantize_outputs=True), "onnxruntime").audit.counts
    assert with_output == {("convolution", "float32"): 1, ("convolution", "int8"): 1, ("matmul", "int8"): 1}


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, pytest.param("tensorrt-rtx", marks=pytest.mark.rtx)])
def test_a_product_of_two_activations_is_not_a_weight_layer(tmp_path, backend):
    if reason := BACKENDS[backend].can_build():
        pytest.skip(reason)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        attention (float[batch, 8, 8] x) => (float[batch, 8, 8] y) <float[8, 8] w> {
            q = MatMul(x, w)
            scores = MatMul(q, x)
            y = Softmax(scores)
        }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"))
    onnx.save(model, tmp_path / "attention.onnx")
    assert make(tmp_path / "attention.onnx", backend).audit.counts == {("matmul", "float32"): 1}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_result_is_not_overwritten_by_the_next_call(tiny_onnx, feeds, backend):
    with open_engine(make(tiny_onnx("int8"), backend)) as engine:
        first = engine(feeds(2))["eps"]
        copy = first.copy()
        engine({"x": feeds(2)["x"] + 1, "t": feeds(2)["t"]})
        np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_engine_refuses_feeds_that_are_not_its_inputs(tiny_onnx, feeds, backend):
    x, t = feeds(4)["x"], feeds(4)["t"]
    with open_engine(make(tiny_onnx("float"), backend, batch=(2, 4, 8))) as engine:
        with pytest.raises(EngineError, match="Batch 9 lies outside this engine's profile 2 to 8"):
            engine(feeds(9))
        with pytest.raises(EngineError, match="Batch 1 lies outside"):
            engine(feeds(1))
        with pytest.raises(EngineError, match="Input 'x' has dtype float64, expected float32"):
            engine({"x": x.astype(np.float64), "t": t})
        with pytest.raises(EngineError, match=r"Input 'x' has shape \(4, 3, 8, 8\), expected \(batch, 4, 8, 8\)"):
            engine({"x": x[:, :3], "t": t})
        with pytest.raises(EngineError, match=r"Input 't' has shape \(3,\), expected \(batch\) with batch 4"):
            engine({"x": x, "t": t[:3]})
        with pytest.raises(EngineError, match=r"Found inputs \['x'\], this engine takes \['x', 't'\]"):
            engine({"x": x})
    with pytest.raises(EngineError, match="is closed"):
        engine(feeds(4))
    engine.close()


def test_an_engine_takes_inputs_that_are_not_contiguous(tiny_onnx, feeds):
    with open_engine(make(tiny_onnx("float"), "openvino")) as engine:
        expected = engine(feeds(4))["eps"]
        strided = {"x": np.asfortranarray(feeds(4)["x"]), "t": np.repeat(feeds(4)["t"], 2)[::2]}
        np.testing.assert_array_equal(engine(strided)["eps"], expected)


def test_an_unknown_backend_is_refused_with_the_nearest_name(tiny_onnx):
    with pytest.raises(EngineError, match=r"Unknown backend 'tensort'.*-cuda'\]. Did you mean 'tensorrt'\?"):
        make(tiny_onnx("float"), "tensort")


def test_the_best_backend_is_the_first_that_can_build_and_run():
    ready = [name for name, backend in BACKENDS.items() if not (backend.can_build() or backend.can_run())]
    assert best_backend() == ready[0]
    assert set(BACKENDS) == {*GPU_BACKENDS, *CPU_BACKENDS}


def test_an_absent_runtime_is_an_error_that_names_the_pip_command(tiny_onnx, monkeypatch):
    file = make(tiny_onnx("float"), "openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    packages = {"tensorrt-rtx": "tensorrt-rtx", "openvino": "openvino", "onnxruntime": "onnxruntime"}
    for backend, package in packages.items():
        with pytest.raises(EngineError, match=f"{backend} cannot build here: .*pip install {package}$"):
            make(tiny_onnx("float"), backend)
    with pytest.raises(EngineError, match=r"built for openvino, which cannot run here: .*pip install openvino"):
        open_engine(file.path)
    with pytest.raises(EngineError, match=r"No backend can build and run here .*pip install openvino"):
        best_backend()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch": (4, 1, 16)}, r"\(4, 1, 16\) is not in order"),
        ({"batch": (0, 1, 16)}, r"\(0, 1, 16\) is not in order"),
        ({"batch": (1, 4, 10**12)}, "Found a batch of 1000000000000; give 65536 at most"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 10**6}, "threads=1000000; give 1 to 1024"),
        ({"optimisation": "extreme"}, "'extreme'. Choose one of .'basic', 'all'."),
        ({"targets": ("sm89",)}, "'sm89'.* only tensorrt-rtx takes targets"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tiny_onnx, config, message):
    with pytest.raises(EngineError, match=message):
        make(tiny_onnx("float"), "openvino", **config)


def test_a_failed_build_leaves_the_previous_engine_as_it_was(tiny_onnx, tmp_path):
    path = tmp_path / "unet.plan"
    config = EngineConfig(backend="openvino")
    before = build(tiny_onnx("int8"), path, config, {"note": "the first"})
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_onnx("int8").read_bytes()[:-40])
    with pytest.raises(EngineError, match=r"broken\.onnx is not a valid ONNX model"):
        build(broken, path, config)
    with pytest.raises(EngineError, match=r"Cannot read the ONNX file .*absent\.onnx: No such file"):
        build(tmp_path / "absent.onnx", path, config)
    with pytest.raises(EngineError, match="The metadata must hold JSON values only"):
        build(tiny_onnx("int8"), path, config, {"path": path})
    assert load_engine_file(path) == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_onnx, tmp_path, backend, monkeypatch):
    source = tiny_onnx("int8")

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EngineError, match=r"Cannot write .*unet\.plan: No space left on device\. Choose a folder"):
        build(source, tmp_path / "out" / "unet.plan", EngineConfig(backend=backend))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_operator_a_runtime_does_not_know_is_a_one_line_error(tiny_onnx, tmp_path, backend):
    model = onnx.load(tiny_onnx("float"))
    model.opset_import.append(onnx.helper.make_opsetid("example.invalid", 1))
    model.graph.node[-1].domain = "example.invalid"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=f"^{backend} cannot .*example.invalid.*$"):
        make(tmp_path / "odd.onnx", backend)


def test_an_engine_holds_weights_that_were_beside_the_onnx_file(tiny_onnx, feeds, tmp_path):
    source = tmp_path / "external.onnx"
    onnx.save(onnx.load(tiny_onnx("int8")), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    file = make(source, "openvino")
    (tmp_path / "w.bin").unlink()
    with open_engine(file.path) as engine:
        assert np.isfinite(engine(feeds(1))["eps"]).all()
