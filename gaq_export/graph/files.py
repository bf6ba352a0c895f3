"""Write ONNX graphs to disk, whole or not at all.

In: a model and a path. Out: the file, and beside it the weights if they are more than protobuf can hold.
"""

import contextlib
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from calib.leftovers import temporary_name
from gaq_export.errors import GaqError

EXTERNAL_BYTES = 1_900_000_000  # of weights; protobuf holds less than 2 GB
_PAGE = 4096  # bytes; runtimes map weights into memory, where a float has to start at a multiple of its size


def save_onnx(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, whole or not at all; weights of more than protobuf's 2 GB go to a file beside it.

    That file has the hash of the weights in its name, so that an old graph never reads new weights, even if this is
    interrupted between the two.

    Raises:
        GaqError: the file cannot be written.
    """
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    apart = _weights_file(path, tensors) if sum(tensor.nbytes for tensor in tensors) > EXTERNAL_BYTES else None
    temporary = path.with_name(temporary_name(path.parent, path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, temporary, "protobuf", external_data=apart, alignment=_PAGE, align_threshold=0)
        temporary.replace(path)
        # Only now is no graph left that reads the weights of an earlier one.
        for old in path.parent.glob(f"{glob.escape(path.name)}.*.data"):
            if old.name != apart:
                old.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise GaqError(f"Cannot write {path}: {error.strerror}. Choose a folder you may write to.") from error


def _weights_file(path: Path, tensors: Sequence[ir.TensorProtocol]) -> str:
    """Return the name of the file for these weights."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.tobytes())
    return f"{path.name}.{sha.hexdigest()[:12]}.data"
