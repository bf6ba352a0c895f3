"""How much memory of a GPU does a calibration need? Counted without a GPU: the sum of live tensors, nothing computed.

The code of a calibration runs on PyTorch's meta device, whose tensors have shapes and no content, in place of the GPU.
Whatever storage an operation makes is counted until it is freed. Attention counts as the kernel that a GPU has for it,
and where the code asks for plain products (`calib.omega` needs second derivatives) as those.

Which blocks there are is seen on a narrow network of the same structure, since that takes numbers.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from calib import blocks, gptq, omega
from calib.block_calibration import Calibration, calibrate_block
from calib.blocks import Block, BlockIO
from calib.config import QuantConfig
from calib.cost import layer_macs
from calib.data import CalibrationSet, Split
from calib.devices import HOST
from calib.layer_choice import choose_layers
from calib.progress import ProgressMeter
from calib.sample_store import IN_MEMORY
from calib.shared_copy import copy_sharing_tensors
from command import write_markdown
from gaq_export.models.architectures import as_denoiser, condition_inputs_of
from gaq_export.models.diffusers_folder import build_network, shape_of
from gaq_export.models.registry import MODELS, ModelSpec, reduced
from gaq_export.quantize.float_engine import GPU_GROUP, GPU_WORK
from gaq_export.quantize.presets import CalibrationOptions, preset
from gaq_export.report.markdown import markdown_table
from options import Out

GPU = torch.device("meta")
GIB = 2.0**30
LIMITS = {"sd15": 12, "sdxl": 24}
SAMPLES, VALIDATION = 512, 50  # at least what the stages draw: how many there are does not change their memory
STAGES = {
    "copies": "copies of a block's weights",
    "start": "GPTQ's start",
    "meta": "sample weights: J, Hessian products",
    "fit": "fitting",
    "decide": "deciding",
}


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages on the GPU that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._older: list[Any] = []

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these tensors, which are there before."""
        self._older += [tensor.untyped_storage() for tensor in tensors]
        self._known |= {s._cdata: weakref.ref(s) for s in self._older}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results; what would bring numbers to the host brings ones."""
        kwargs = kwargs or {}
        if (bridged := _to_host(func, args, kwargs)) is not None:
            return bridged
        out = func(*args, **kwargs)
        for value in pytree.tree_leaves(out):
            if isinstance(value, Tensor) and value.device == GPU:
                self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _to_host(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what an operation that reads the GPU's numbers returns, None if it does not."""
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].device == GPU:
        return True if args[0].dtype == torch.bool else 1.0
    if func is aten.copy_.default and args[1].device == GPU and args[0].device == HOST:
        return args[0]
    if func is aten._to_copy.default and args[0].device == GPU and kwargs.get("device") == HOST:
        # One number, spread: the shape is there, and no memory.
        return torch.ones((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
    return None


class FusedAttention(TorchFunctionMode):
    """Has attention on the meta device computed by the kernel that a GPU takes for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or that kernel in its place."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and SDPBackend.EFFICIENT_ATTENTION in _cur_sdpa_kernel_backends():
            q, k, v = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            needs_log = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
            return kernel(q, k, v, None, needs_log, 0.0, False, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Rows:
    """A recording on the host, whose rows appear on the GPU when they are taken."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return as many rows as `index` has."""
        return torch.empty(len(index), *self.shape[1:], dtype=self.dtype, device=GPU)


@dataclass(frozen=True)
class Network:
    """A network without numbers.

    Attributes:
        module: on the meta device.
        shape: (C, H, W) of its input.
        condition: a row of each.
        blocks: in order.
        layers: names of all that are quantized.
    """

    module: nn.Module
    shape: tuple[int, ...]
    condition: dict[str, Tensor]
    blocks: list[Block]
    layers: list[str]

    def inputs(self, batch: int) -> tuple[Any, ...]:
        """Return x, t and the condition on the GPU."""
        x, t = torch.empty(batch, *self.shape, device=GPU), torch.zeros(batch, dtype=torch.int64, device=GPU)
        rows = {k: torch.empty(batch, *v.shape[1:], dtype=v.dtype, device=GPU) for k, v in self.condition.items()}
        return (x, t, rows) if rows else (x, t)

    @property
    def float_bytes(self) -> int:
        """Of all parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.module.parameters(), *self.module.buffers()))

    @property
    def code_bytes(self) -> int:
        """Of the codes, and of the scales, of all quantized layers: finished blocks have them beside the weights."""
        weights = [self.module.get_parameter(f"{name}.weight") for name in self.layers]
        return sum(w.numel() + 4 * len(w) for w in weights)


def network_of(spec: ModelSpec, config: QuantConfig) -> Network:
    """Return a model's network on the meta device, and the blocks that its calibration has."""
    narrow = reduced(spec)
    deep = {k: spec.config[k] for k in ("layers_per_block", "transformer_layers_per_block") if k in spec.config}
    torch.manual_seed(0)
    config_of_small = {**narrow.config, **deep}
    small = build_network(config_of_small, "the table")
    shape, condition = shape_of(config_of_small), condition_inputs_of(small)
    data = CalibrationSet(
        x=torch.randn(2, *shape),
        t=torch.tensor([900, 100]),
        step=torch.arange(2),
        cond={k: v.repeat_interleave(2, 0) for k, v in condition.items()},
    )
    chosen = choose_layers(
        as_denoiser(small), data, config, timesteps=1000, clock=None, on_progress=lambda progress: None
    )
    found, _ = blocks.find_blocks(chosen.traced, chosen.layers)
    with GPU:
        module = build_network(spec.config, "the table").requires_grad_(False)
    return Network(as_denoiser(module), shape_of(spec.config), condition_inputs_of(module), found, [*chosen.layers])


@contextmanager
def counted(network: nn.Module) -> Iterator[Live]:
    """Count what is made meanwhile on the GPU."""
    live = Live()
    live.leave_out([*network.parameters(), *network.buffers()])
    with FusedAttention(), live:
        yield live


def forward_peak(network: Network, batch: int) -> int:
    """Return the bytes of a forward pass beside the weights."""
    with torch.no_grad(), counted(network.module) as live:
        network.module(*network.inputs(batch))
    return live.peak


def recordings(network: Network) -> dict[str, BlockIO]:
    """Return each block's recording, by its name."""
    found: dict[str, BlockIO] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            batched = tuple(isinstance(v, Tensor) and v.ndim > 0 and len(v) == 2 for v in leaves)
            rows = tuple(_rows(v) if b else v for v, b in zip(leaves, batched, strict=True))
            found[name] = BlockIO(inputs=rows, batched=batched, spec=spec, target=cast(Any, _rows(out)), device=GPU)

        return hook

    handles = [
        network.module.get_submodule(block.name).register_forward_hook(note(block.name), with_kwargs=True)
        for block in network.blocks
    ]
    with torch.no_grad(), FusedAttention():
        network.module(*network.inputs(2))
    for handle in handles:
        handle.remove()
    return found


def _rows(like: Tensor) -> Rows:
    return Rows((SAMPLES, *like.shape[1:]), like.dtype)


@dataclass
class Phases:
    """Stands in for a progress meter: the peak of each phase of a block's calibration."""

    live: Live
    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak meanwhile."""
        self.peaks.setdefault("copies", self.live.peak)
        self.live.peak = self.live.now
        yield
        self.peaks[name] = self.live.peak


def block_peaks(network: Network, copied: nn.Module, block: Block, io: BlockIO, config: QuantConfig) -> dict[str, int]:
    """Return the bytes that each phase of a block's calibration needs beside the weights."""
    with counted(network.module) as live:
        meter = Phases(live)
        every = torch.arange(SAMPLES)
        empty = torch.zeros(SAMPLES, 1)
        data = CalibrationSet(x=empty, t=every, step=every, device=GPU)
        validation = every[:VALIDATION]
        split = Split(data=data, train=every[VALIDATION:], validation=validation, group=validation % 5)
        weights = {name: network.module.get_parameter(f"{name}.weight") for name in block.layers}
        calibration = Calibration(
            model=network.module,
            network=copied,
            scales={name: torch.empty(len(w), device=GPU) for name, w in weights.items()},
            bits=dict.fromkeys(weights, config.weight.bits),
            data=data,
            samples=split,
            config=config,
            key="",
            store=IN_MEMORY,
            meter=cast(ProgressMeter, meter),
        )
        calibrate_block(calibration, block, io, torch.zeros(len(split.train), dtype=torch.float64), lambda done: None)
    return meter.peaks


def main(
    models: Annotated[str, typer.Option(help="Names, with commas between them.")] = ",".join(LIMITS),
    out: Out = None,
) -> None:
    """Count and write the page."""
    config = preset("fast", CalibrationOptions()).config
    # As much memory in two iterations as in all.
    config = replace(
        config,
        reconstruction=replace(config.reconstruction, iterations=2),
        omega=replace(config.omega, meta_steps=1),
    )
    counts = [count(name, config) for name in models.split(",")]
    write_markdown(page(counts, config), out)


@dataclass(frozen=True)
class Count:
    """What a model needs.

    Attributes:
        name: of the model.
        network: its network.
        forward: bytes of a forward pass by batch.
        largest: by stage, bytes, and the block that needs most.
    """

    name: str
    network: Network
    forward: dict[int, int]
    largest: dict[str, tuple[int, str]]

    @property
    def lasting(self) -> int:
        """Bytes that are there all the time, towards the end of a calibration."""
        return self.network.float_bytes + self.network.code_bytes

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return self.total_without()

    def total_without(self, *stages: str) -> int:
        """Return the bytes at the worst moment of a calibration that does not have some stages."""
        sizes = [size for stage, (size, _) in self.largest.items() if stage not in stages]
        return self.lasting + max(*self.forward.values(), *sizes)


def count(name: str, config: QuantConfig) -> Count:
    """Count a model's calibration, of each kind of block the largest."""
    network = network_of(MODELS[name], config)
    macs = sum(layer_macs(network.module, network.shape, 1000, network.condition).values())
    images = max(1, min(GPU_GROUP, int(GPU_WORK / macs)))
    guided = 2 if MODELS[name].guidance != 1 else 1
    forward = {batch: forward_peak(network, batch) for batch in sorted({config.micro_batch, guided * images})}
    copied = copy_sharing_tensors(network.module)
    recorded = recordings(network)
    largest: dict[str, tuple[int, str]] = {}
    chosen = _extremes(network, recorded)
    for number, block in enumerate(chosen, start=1):
        peaks = block_peaks(network, copied, block, recorded[block.name], config)
        largest = {stage: max(largest.get(stage, (0, "")), (size, block.name)) for stage, size in peaks.items()}
        shown = ", ".join(f"{stage} {size / GIB:.2f}" for stage, size in peaks.items())
        print(f"{name}: {number} of {len(chosen)}, {block.name}: {shown} GiB", flush=True)
    return Count(name, network, forward, largest)


def _extremes(network: Network, recorded: dict[str, BlockIO]) -> list[Block]:
    """Return, of each kind of module, the block with the most weights and the one with the largest input."""

    def weights(block: Block) -> int:
        return sum(network.module.get_parameter(f"{name}.weight").numel() for name in block.layers)

    def rows(block: Block) -> int:
        return sum(math.prod(v.shape) for v in recorded[block.name].inputs if isinstance(v, Rows))

    kinds: dict[type, list[Block]] = {}
    for block in network.blocks:
        kinds.setdefault(type(network.module.get_submodule(block.name)), []).append(block)
    chosen = [max(alike, key=size) for alike in kinds.values() for size in (weights, rows)]
    return list({block.name: block for block in chosen}.values())


@contextmanager
def stand_ins() -> Iterator[None]:
    """Leave out what takes numbers or the host's time.

    GPTQ rounds one column in place of thousands, which take the same memory, and nothing of what it leaves to the host.
    The gradients of samples have a size, though they have no content.
    """
    round_columns, root_mean_square = gptq.round_columns, omega._root_mean_square

    def rounded(weight: Tensor, moments: Tensor, scale: Tensor, bits: int) -> Tensor:
        if 8 * moments.numel() > gptq.ON_DEVICE:
            return torch.empty(weight.shape, dtype=torch.int8, device=GPU)
        return round_columns(weight, moments, scale, bits)

    def size(jacobian: Tensor) -> float:
        return root_mean_square(jacobian) if jacobian.device == GPU else 1.0

    gptq.round_columns, omega._root_mean_square = rounded, size
    vars(gptq)["range"] = lambda *limits: range(*limits)[:1]
    try:
        yield
    finally:
        gptq.round_columns, omega._root_mean_square = round_columns, root_mean_square
        del vars(gptq)["range"]


def page(counts: Sequence[Count], config: QuantConfig) -> list[str]:
    """Return the lines of the page."""
    rows = [row for one in counts for row in _rows_of(one)]
    verdicts = [line for one in counts for line in _verdicts(one)]
    return [
        "# GPU memory of a calibration, counted",
        "",
        "    python benchmarks/device_memory.py",
        "",
        "The sum of live tensors on the GPU while `--preset fast` calibrates to 4-bit weights, at the worst moment of",
        "each stage, beside what is there all the time:",
        "",
        *verdicts,
        "",
        *markdown_table(("model", "stage", "where it needs most", "GiB"), rows),
        "",
        "Counted without a GPU: the code of a calibration runs on PyTorch's meta device, whose tensors have shapes",
        "and no content, and each storage that an operation makes counts until it is freed. Nothing is computed.",
        "Of each kind of module the block with the most weights and the one with the largest input are counted.",
        "Latents are 64 x 64 (sd15) and 128 x 128 (sdxl), with guidance. Total: weights, codes and the largest of the",
        "other rows. Attention counts as the memory-efficient kernel, except for sample weights, where second",
        f"derivatives need plain products. Recording takes {config.micro_batch} samples a forward pass.",
        "",
        "Not counted: the CUDA context and the code of its kernels (about 0.5 GiB), work space of cuDNN, cuBLAS and",
        "cuSOLVER, gaps in PyTorch's allocator, and recordings, which lie on the GPU only while they take at most a",
        "quarter of what is free (`--cache host` keeps them off it). A captured iteration of the fitting keeps its",
        "memory while a block is fitted, as much as the row says.",
    ]


def _verdicts(one: Count) -> Iterator[str]:
    limit = LIMITS[one.name]
    holds = one.total <= limit * GIB
    yield f"- {one.name}: {one.total / GIB:.1f} GiB, {'within' if holds else 'more than'} the limit of {limit} GiB."
    if not holds:
        without = one.total_without("meta") / GIB
        yield (
            f"  With `--omega uniform`, which learns no sample weights, {without:.1f} GiB: "
            f"{'within' if without <= limit else 'more than'} the limit."
        )


def _rows_of(one: Count) -> Iterator[tuple[str, ...]]:
    def row(stage: str, place: str, size: int) -> tuple[str, ...]:
        return one.name, stage, place, f"{size / GIB:.2f}"

    yield row("float weights", "", one.network.float_bytes)
    yield row("codes and scales", "all blocks finished", one.network.code_bytes)
    for batch, size in one.forward.items():
        yield row(f"forward pass, batch {batch}", "", size)
    for stage, title in STAGES.items():
        size, block = one.largest[stage]
        yield row(title, f"`{block}`", size)
    yield row("**total**", "", one.total)


if __name__ == "__main__":
    with stand_ins():
        typer.run(main)
