"""By topic, over `graph`, `files` and all backends: weights too large for one file, from ONNX file to engine."""

import importlib.util

import numpy as np
import onnx
import pytest

from engines import EngineConfig, EngineError, build, files_of, graph, load_engine_file, open_engine
from engines.files import data_path


@pytest.fixture
def spread(tiny_onnx, tmp_path):
    """The tiny network, each of its weights in a file of its own."""
    path = tmp_path / "in" / "unet.onnx"
    path.parent.mkdir()
    model = onnx.load(tiny_onnx("int4cast"))
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64)
    assert len(list(path.parent.iterdir())) > 2
    return path


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(graph, "ONE_FILE_BYTES", 100)


def make(path, folder, backend="openvino", **config):
    return build(path, folder / "unet.plan", EngineConfig(backend=backend, batch=(1, 2, 8), **config))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_engine_with_its_weights_apart_computes_the_same(tiny_onnx, spread, small_files, feeds, tmp_path, backend):
    whole = make(tiny_onnx("int4cast"), tmp_path / "whole", backend, threads=1)
    parted = make(spread, tmp_path / "parted", backend, threads=1)
    assert whole.data is None
    assert parted.data is not None
    assert parted.audit == whole.audit
    assert parted.path.stat().st_size < whole.path.stat().st_size
    for path in spread.parent.iterdir():
        path.unlink()  # the engine has copies
    with open_engine(whole) as one, open_engine(load_engine_file(parted.path)) as other:
        for batch in (2, 5):
            np.testing.assert_array_equal(other(feeds(batch))["eps"], one(feeds(batch))["eps"])


def test_weights_that_go_into_one_file_do(tiny_onnx, spread, feeds, tmp_path):
    assert make(spread, tmp_path / "a").data is None
    whole = make(tiny_onnx("int4cast"), tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["unet.plan", "unet.plan.json"]
    with open_engine(tmp_path / "a" / "unet.plan") as one, open_engine(whole) as other:
        np.testing.assert_array_equal(one(feeds(2))["eps"], other(feeds(2))["eps"])


def test_the_same_weights_apart_give_the_same_files(spread, small_files, tmp_path):
    first, second = (make(spread, tmp_path / name) for name in "ab")
    assert (first.sha256, first.data) == (second.sha256, second.data)


def test_an_engine_of_one_piece_takes_the_place_of_one_with_its_weights_apart(
    spread, small_files, tmp_path, monkeypatch
):
    file = make(spread, tmp_path / "out")
    assert [path.name for path in files_of(file.path) if path.exists()] == [
        "unet.plan.data",
        "unet.plan",
        "unet.plan.json",
    ]
    monkeypatch.undo()
    assert make(spread, tmp_path / "out").data is None
    assert not data_path(file.path).exists()


def test_weights_that_were_changed_or_are_gone_are_refused(spread, small_files, tmp_path):
    file = make(spread, tmp_path / "out")
    content = bytearray(data_path(file.path).read_bytes())
    content[len(content) // 2] ^= 1
    data_path(file.path).write_bytes(content)
    with pytest.raises(EngineError, match=r"The weights .*unet\.plan\.data has SHA-256"):
        open_engine(file)
    data_path(file.path).unlink()
    with pytest.raises(EngineError, match=r"Cannot read the weights .*unet\.plan\.data: No such file"):
        load_engine_file(file.path)


def test_an_onnx_file_whose_weights_are_gone_is_refused(spread, tmp_path):
    next(path for path in spread.parent.iterdir() if path != spread).unlink()
    with pytest.raises(EngineError, match=r"unet\.onnx is not a valid ONNX model"):
        make(spread, tmp_path / "out")


@pytest.mark.rtx
def test_the_builder_of_tensorrt_rtx_finds_weights_that_lie_apart(tiny_onnx, spread, small_files, tmp_path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    files = [make(path, tmp_path / str(i), "tensorrt-rtx") for i, path in enumerate((tiny_onnx("int4cast"), spread))]
    assert files[0].audit == files[1].audit
    assert files[1].data is None  # TensorRT puts the weights into the engine
    assert files[0].path.stat().st_size == pytest.approx(files[1].path.stat().st_size, rel=0.05)


@pytest.mark.rtx
def test_weights_in_separate_files_cannot_be_left_out_of_an_engine(spread, small_files, tmp_path):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    with pytest.raises(EngineError, match="has weights in other files"):
        make(spread, tmp_path / "out", "tensorrt-rtx", stripped=True)
