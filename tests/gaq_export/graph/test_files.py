"""Graphs are written whole or not at all, with their weights beside them where they are too large."""

import errno
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from gaq_export.errors import GaqError
from gaq_export.graph.files import save_onnx
from tests.gaq_export.readback import run


def test_a_graph_that_cannot_be_written_is_an_error(tiny_graph, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        GaqError, match=r"Cannot write .*: (File exists|Not a directory). Choose a folder you may write to."
    ):
        save_onnx(tiny_graph(), tmp_path / "file" / "unet.onnx")


def test_weights_beyond_one_file_go_beside_it(tiny_graph, noisy, tmp_path: Path, monkeypatch) -> None:
    proto, other = ir.to_proto(tiny_graph()), ir.to_proto(tiny_graph())
    _change_a_weight(other)
    monkeypatch.setattr("gaq_export.graph.files.EXTERNAL_BYTES", 1000)
    path = tmp_path / "unet.onnx"
    save_onnx(ir.from_proto(proto), path)
    (weights,) = tmp_path.glob("unet.onnx.*.data")
    assert path.stat().st_size + weights.stat().st_size > len(proto.SerializeToString()) > path.stat().st_size
    assert torch.equal(run(onnx.load(path), noisy(16)), run(proto, noisy(16)))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _full)
        with pytest.raises(GaqError, match=r"Cannot write .*No space left"):
            save_onnx(ir.from_proto(other), path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    save_onnx(ir.from_proto(other), path)
    assert len(list(tmp_path.iterdir())) == 2  # the old weights are gone
    assert torch.equal(run(onnx.load(path), noisy(16)), run(other, noisy(16)))


def _full(self: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _change_a_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "unet.conv_in.weight")
    tensor.CopyFrom(numpy_helper.from_array(2 * np.asarray(numpy_helper.to_array(tensor)), tensor.name))
