"""The types that all engines share."""

import json
from dataclasses import replace

import pytest

from engines import Audit, EngineConfig, EngineError, Kernel, LayerKind, Optimisation, PortabilityCost, TensorSpec
from engines.records import parse_record

AUDIT = Audit(
    kernels=(
        Kernel(name="a", kind=LayerKind.CONVOLUTION, precision="int8"),
        Kernel(name="b", kind=LayerKind.CONVOLUTION, precision="int8"),
        Kernel(name="c", kind=LayerKind.MATMUL, precision="float32"),
    ),
    weight_bytes={"int8": 10, "float32": 4},
    note="as stored",
)


def test_an_audit_counts_layers_and_bytes_and_survives_json() -> None:
    assert AUDIT.counts == {("convolution", "int8"): 2, ("matmul", "float32"): 1}
    assert AUDIT.total_weight_bytes == 14
    again = parse_record(Audit, json.dumps(AUDIT.to_json()), "here", "Again")
    assert again == AUDIT
    assert all(isinstance(kernel.kind, LayerKind) for kernel in again.kernels)


def test_what_portability_costs_is_a_phrase_and_unmeasured_time_says_so() -> None:
    cost = PortabilityCost(bytes=2_100_000, plain_bytes=2_000_000)
    assert str(cost) == "2.10 MB in place of 2.00; time not measured, since it cannot run here"
    timed = replace(cost, seconds=0.012, plain_seconds=0.01)
    assert str(timed) == "2.10 MB in place of 2.00; 12 ms a call in place of 10"
    audit = replace(AUDIT, portability=timed)
    assert parse_record(Audit, json.dumps(audit.to_json()), "here", "Again") == audit


def test_a_portable_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(EngineError, match=r"^Unknown portable \['os'\]\. Choose from \['version', 'gpu'\]\.$"):
        EngineConfig(backend="tensorrt", portable=("os",))


def test_a_layer_of_an_unknown_kind_is_a_damaged_record() -> None:
    record = AUDIT.to_json()
    record["kernels"][0]["kind"] = "pooling"
    with pytest.raises(EngineError, match=r"here: kernels\.0\.kind is 'pooling', expected 'convolution' or 'matmul'"):
        parse_record(Audit, json.dumps(record), "here", "Again")


def test_the_dynamic_dimension_is_the_batch() -> None:
    assert TensorSpec(name="x", dtype="float32", shape=(None, 3, 8, 8)).at_batch(5) == (5, 3, 8, 8)
    assert TensorSpec(name="step", dtype="int64", shape=(1,)).at_batch(5) == (1,)


def test_a_config_takes_an_optimisation_by_name_and_refuses_a_wrong_one() -> None:
    assert EngineConfig(backend="onnxruntime", optimisation="basic").optimisation is Optimisation.BASIC
    with pytest.raises(EngineError, match=r"Unknown optimisation 'most'\. Choose one of \['basic', 'all'\]\."):
        EngineConfig(backend="onnxruntime", optimisation="most")
