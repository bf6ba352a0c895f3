"""Record what goes in and out of each block: inputs from the quantized network, targets from the float one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from calib import temporal
from calib.block_replay import Replay
from calib.blocks import Block, BlockIO
from calib.data import CalibrationSet
from calib.errors import CalibError
from calib.leftovers import temporary_name
from calib.sample_store import IN_MEMORY, SampleStore


class Recorder:
    """Follows a calibration block by block; from `open_recorder`."""

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        data: CalibrationSet,
        micro_batch: int,
        store: SampleStore,
        *,
        reference: bool,
    ) -> None:
        self._data = data
        self._micro_batch = micro_batch
        self._reference = reference
        self._float = Replay(model, data, micro_batch, store.inside("float"))
        self._quantized = Replay(network, data, micro_batch, store.inside("quantized"))

    def record(self, block: Block) -> BlockIO:
        """Pair the block's inputs in the quantized network with its output in the float one (asymmetric).

        The target is the float network's, so that a block also makes up for the errors before it.
        If `reference`, its inputs in the float network are recorded too.
        """
        if block.module is not None:
            return temporal.record(block.module, self._data, self._micro_batch)
        reference = self._float.inputs(block.name)[0] if self._reference else None
        target = self._float.output(block.name)
        inputs, batched, spec = self._quantized.inputs(block.name)
        device = self._data.device
        return BlockIO(inputs=inputs, batched=batched, spec=spec, target=target, reference=reference, device=device)

    def finish(self, block: Block) -> None:
        """Mark the block as finished: its weights in the quantized network will not change any more."""
        if block.module is None:
            self._float.finish(block.name)
            self._quantized.finish(block.name)


@contextmanager
def open_recorder(
    model: nn.Module,
    network: nn.Module,
    data: CalibrationSet,
    micro_batch: int,
    store: SampleStore = IN_MEMORY,
    *,
    reference: bool = False,
) -> Iterator[Recorder]:
    """Yield a recorder whose files, if it writes any, lie in a scratch folder, which is removed afterwards.

    Args:
        model: the float network.
        network: its copy, quantized block by block.
        data: the N samples to record.
        micro_batch: samples a forward pass.
        store: where recordings go; in its folder, if it has one, the scratch folder is made.
        reference: whether the inputs of a block in the float network are recorded too.

    Raises:
        CalibError: the folder cannot be written.
    """
    folder = store.folder
    if folder is None:
        yield Recorder(model, network, data, micro_batch, store, reference=reference)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=f"{temporary_name(folder, 'scratch')}.")
    except OSError as error:
        raise CalibError(f"Cannot write {folder}: {error.strerror}. Choose a folder you may write to.") from error
    with scratch as name:
        scratch_store = replace(store, folder=Path(name))
        yield Recorder(model, network, data, micro_batch, scratch_store, reference=reference)
