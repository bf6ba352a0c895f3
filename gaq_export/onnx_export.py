"""The float network as an ONNX graph: inputs `x` (batch, C, H, W) and `t` (batch,), output `eps`, opset 21.

The plain network is exported, never the fake-quantized one: Q/DQ comes afterwards (`gaq_export.qdq`), straight from
the plan's integers. Opset 21 is the first with INT4 and with per-channel GroupNormalization.
"""

import onnx_ir as ir
import torch
from torch import nn

from calib.quiet import quiet
from gaq_export.errors import GaqError

OPSET = 21
EXAMPLE_BATCH = 2


def export_float(network: nn.Module, shape: tuple[int, int, int]) -> ir.Model:
    """Return the float graph of `network`.

    Args:
        network: in eval mode, called as (x, t); its layers' module names end up in the nodes' metadata.
        shape: (C, H, W).

    Raises:
        GaqError: torch cannot export it, or the batch did not stay dynamic.
    """
    x = torch.zeros(EXAMPLE_BATCH, *shape)
    t = torch.zeros(EXAMPLE_BATCH, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    try:
        with quiet("torch.onnx"):  # notes about absent optional packages
            program = torch.onnx.export(
                network,
                (x, t),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: batch}, {0: batch}),
                input_names=["x", "t"],
                output_names=["eps"],
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; all mean the same to a user
        reason = str(error).strip().splitlines()
        raise GaqError(f"torch cannot export this network to ONNX: {reason[0] if reason else error!r}") from error
    assert program is not None
    model = program.model
    first = model.graph.inputs[0].shape
    if first is None or isinstance(first[0], int):
        raise GaqError(f"The exported graph fixed its batch at {first and first[0]}: the network's code depends on it.")
    return model
