"""An engine and its record are read back as written, and anything else is noticed."""

import dataclasses
import json

import pytest

from engines import (
    EngineConfig,
    EngineError,
    EngineFile,
    EngineWarning,
    TensorSpec,
    build,
    load_engine_file,
    open_engine,
)
from engines.machine import cpu_features
from tests.records import edit_engine_record


@pytest.fixture
def file(tiny_onnx, tmp_path):
    return build(
        tiny_onnx("int4cast"),
        tmp_path / "out" / "unet.plan",
        EngineConfig(backend="onnxruntime", batch=(1, 2, 8), threads=1, optimisation="basic"),
        {"sampler": {"steps": 20}, "seeds": [1, 2]},
    )


def record(file):
    return file.path.with_name("unet.plan.json")


def rewrite(file, **changes):
    edit_engine_record(file.path, lambda fields: fields.update(changes))


def test_an_engine_file_is_read_back_as_it_was_written(file):
    assert load_engine_file(file.path) == file
    assert file.inputs == (
        TensorSpec(name="x", dtype="float32", shape=(None, 4, 8, 8)),
        TensorSpec(name="t", dtype="int64", shape=(None,)),
    )
    assert file.outputs == (TensorSpec(name="eps", dtype="float32", shape=(None, 16, 8, 8)),)
    assert file.metadata == {"sampler": {"steps": 20}, "seeds": [1, 2]}
    assert file.audit.total_weight_bytes == sum(file.audit.weight_bytes.values()) > 0


def test_the_same_model_gives_the_same_engine(file, tiny_onnx, tmp_path):
    again = build(tiny_onnx("int4cast"), tmp_path / "again.plan", EngineConfig(backend="onnxruntime"))
    assert again.sha256 == file.sha256


def test_a_truncated_engine_is_refused(file):
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(EngineError, match=f"its record says {file.sha256[:12]}.*Build the engine again"):
        load_engine_file(file.path)


def test_an_engine_edited_after_it_was_loaded_is_refused(file):
    loaded = load_engine_file(file.path)
    content = bytearray(file.path.read_bytes())
    content[len(content) // 2] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(EngineError, match="has SHA-256"):
        open_engine(loaded)


def test_a_missing_engine_or_record_is_refused(file):
    file.path.unlink()
    with pytest.raises(EngineError, match=r"Cannot read the engine .*unet\.plan: No such file"):
        load_engine_file(file.path)
    record(file).unlink()
    with pytest.raises(EngineError, match=r"Cannot read the engine record .*unet\.plan\.json: No such file"):
        open_engine(file.path)


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_is_no_engine(name):
    with pytest.raises(EngineError, match=r"is a folder; give the engine's file, such as "):
        load_engine_file(name)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"batch": ' + b"9" * 9999 + b"}"])
def test_a_record_that_is_not_json_is_refused(file, content):
    record(file).write_bytes(content)
    with pytest.raises(EngineError, match=r"unet\.plan\.json: .*\. Build the engine again\.$") as error:
        load_engine_file(file.path)
    assert "\n" not in str(error.value)


WRONG = [None, "x", 3.5, -1, 10**30, [], {}, [[[]]], {"a": {"b": None}}, True]


def wrong_values(name):
    """Return values that no record has under this name."""
    fits = {
        "batch": [],
        "threads": [None],
        "targets": [[]],
        "portable": [[]],
        "processor": [None, []],
        "metadata": [{}, {"a": {"b": None}}],
        "build_seconds": [3.5, 10**30],
        "weights": [None],
        "data": [None],
        "backend": ["x"],
        "inputs": [[]],
        "outputs": [[]],
    }
    return [value for value in WRONG if value not in fits.get(name, [])]


RECORDED = [field.name for field in dataclasses.fields(EngineFile) if field.name not in ("path", "gpu")]


@pytest.mark.parametrize("name", RECORDED)
def test_a_field_that_is_missing_or_of_another_kind_is_named(file, name):
    edit_engine_record(file.path, lambda fields: fields.pop(name))
    with pytest.raises(EngineError, match=f"json: {name} is missing. Build the engine again"):
        load_engine_file(file.path)
    for value in wrong_values(name):
        edit_engine_record(file.path, lambda fields, value=value: fields.update({name: value}))
        with pytest.raises(EngineError, match=rf"json: {name}[. ].*Build the engine again\.$") as error:
            load_engine_file(file.path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "has format 99, this version reads 7"),
        ({"colour": "red"}, "colour is a field that this version does not know"),
        ({"batch": [-1, 0, -3]}, "batch.0 is -1, expected greater than or equal to 1 .and 2 more"),
        ({"batch": [4, 2, 8]}, r"batch is \[4, 2, 8\], expected least, best and most in order"),
        ({"inputs": [{"name": "x", "dtype": "float31", "shape": [1]}]}, "dtype is 'float31', expected a type of NumPy"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [10**12]}]}, "inputs.0.shape.0 is 1000000000000, exp"),
        ({"audit": {"kernels": []}}, "audit.weight_bytes is missing"),
    ],
)
def test_a_record_of_another_shape_is_refused(file, changes, message):
    edit_engine_record(file.path, lambda fields: fields.update(changes))
    with pytest.raises(EngineError, match=message) as error:
        load_engine_file(file.path)
    assert "\n" not in str(error.value)


def test_a_list_is_not_a_record(file):
    record(file).write_text("[1]")
    with pytest.raises(EngineError, match=r"the record is \[1\], expected an object"):
        load_engine_file(file.path)


def test_an_edited_record_is_refused_whatever_was_edited(file):
    values = json.loads(record(file).read_text())
    record(file).write_text(json.dumps(values))  # laid out in another way, which changes nothing
    assert load_engine_file(file.path) == file
    values["metadata"]["sampler"]["steps"] = 3
    record(file).write_text(json.dumps(values))
    with pytest.raises(EngineError, match=r"unet\.plan\.json was edited since it was written .*Build the engine again"):
        load_engine_file(file.path)


def test_an_engine_for_a_backend_this_version_does_not_have_is_refused(file):
    rewrite(file, backend="onnxruntine")
    with pytest.raises(EngineError, match=r"Unknown backend 'onnxruntine'.*Did you mean 'onnxruntime'"):
        open_engine(file.path)


def test_an_engine_of_another_processor_is_opened_with_one_line(file):
    assert file.processor == cpu_features()
    open_engine(file.path).close()  # without a warning, which would be an error here
    rewrite(file, processor=[*cpu_features(), "of-the-future"])
    with pytest.warns(
        EngineWarning, match="^the engine was built on another processor: this one lacks of-the-future"
    ) as w:
        open_engine(file.path).close()
    assert len(w) == 1
    assert "\n" not in str(w[0].message)
