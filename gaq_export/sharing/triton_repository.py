"""A model repository for a Triton Inference Server: denoising steps as its model, the loop as its client.

    models/unet/config.pbtxt, models/unet/1/model.onnx or model.plan
    models/decoder/...                   of latents, if it draws latents
    models/text/..., models/text-2/...   encoders of prompts, if it takes prompts
    client.py, philox.py, text.tokens.json ..., README.md

In this graph the step is one number for each image, (N,), so that the server's batcher may put together requests of
different steps. Triton's tensors have a batch and at least one more dimension, so (N,) is declared as (N, 1), with a
`reshape`. Numbers that the loop needs are parameters of the model's config, which the client asks the server for.
"""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.files import write_atomically
from calib.plan import load_plan
from calib.step_bits import widths
from engines import EngineConfig, EngineFile, TensorSpec, philox
from engines.files import data_path
from gaq_export import folders
from gaq_export.deploy.build import BuildOptions, Built, build
from gaq_export.deploy.record import TextEncoders, record_of
from gaq_export.diffusion.conditioning import LABELS, Conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import load_conditioning, provenance_of
from gaq_export.report.markdown import plain
from gaq_export.run import Run

MARK = "client.py"
NAME = "unet"
DECODER = "decoder"
TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Server:
    """How Triton runs the engines of one of our backends: its backend, the model's file, and where."""

    backend: str
    file: str  # the name that Triton looks for with this backend
    kind: str


SERVERS: Mapping[str, Server] = {
    "onnxruntime": Server(backend="onnxruntime", file="model.onnx", kind="KIND_CPU"),
    "onnxruntime-cuda": Server(backend="onnxruntime", file="model.onnx", kind="KIND_GPU"),
    "tensorrt": Server(backend="tensorrt", file="model.plan", kind="KIND_GPU"),
}
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How the steps are served.

    Attributes:
        backend: a key of `SERVERS`.
        largest_batch: images that the server may put together.
        sampler: whose steps; the plan's if None.
    """

    backend: str = "onnxruntime"
    largest_batch: int = 16
    sampler: SamplerSpec | None = None


def write(
    folder: str | Path,
    out: str | Path,
    options: ServingOptions = ServingOptions(),
    *,
    model: LoadedModel | None = None,
) -> Path:
    """Build the steps, check them against PyTorch, and write the repository with its client.

    Args:
        folder: run folder with a finished plan.
        out: the folder; a repository that is there is replaced.
        options: how the steps are served.
        model: the float model; loaded again by the plan's provenance if None.

    Raises:
        GaqError, CalibError, EngineError: what `build_engine` raises; a plan that needs several engines; a folder that
            is no repository.
    """
    run = Run(folder=Path(folder))
    if options.backend not in SERVERS:
        raise GaqError(f"A Triton server has no backend for {options.backend!r}. Choose one of {list(SERVERS)}.")
    out = Path(out)
    folders.check_replaceable(out, MARK)
    plan = load_plan(run.plan)
    if len(widths(plan)) > 1:
        raise GaqError("This plan's steps differ in activation bits, so it needs several engines and cannot be served.")
    conditioning = load_conditioning(provenance_of(plan), run.folder)
    most = options.largest_batch  # and from 1 on, since a server may have a single request
    config = EngineConfig(backend=options.backend, batch=(1, min(4, most), most))
    with folders.staging(out) as staged:
        engine = staged / "engine" / SERVERS[options.backend].file
        repository = staged / "repository"
        engine.parent.mkdir()
        # With rows, the images of a batch may be at different steps, so that the batcher may mix clients.
        building = BuildOptions(config=config, sampler=options.sampler, rows=True, step_name="triton")
        built = build(run, engine, building, model)
        _install_all(built, engine, conditioning, repository)
        _write_client(built, repository)
        folders.replace_folder(repository, out)
    return out


def _install_all(built: Built, engine: Path, conditioning: Conditioning | None, repository: Path) -> None:
    """Move all engines, and the tokenizers beside `engine`, to where the server and the client look for them."""
    record = record_of(built.file)
    spec = record.provenance.sampler
    texts = record.text_encoders
    facts = {"steps": spec.steps, "sampler": str(spec), **_conditioning_facts(conditioning, texts)}
    if built.decoder is not None:
        facts |= {"decoder": DECODER}
        _install(DECODER, built.decoder.file, repository, {})
    tokenizers = [] if texts is None else [engine.with_name(each.file) for each in texts.tokenizers]
    for name, encoder, tokenizer in zip(facts.get("texts", ()), built.texts, tokenizers, strict=True):
        _install(name, encoder.file, repository, {})
        shutil.move(tokenizer, repository / f"{name}.tokens.json")
    _install(NAME, built.file, repository, facts)


def _write_client(built: Built, repository: Path) -> None:
    """Write the client, the one module that it needs beside it, and how to use both."""
    write_atomically(repository / MARK, client_text().encode())
    write_atomically(repository / "philox.py", inspect.getsource(philox).encode())
    write_atomically(repository / "README.md", _readme(built).encode())


def _install(name: str, file: EngineFile, repository: Path, facts: Mapping[str, Any]) -> None:
    """Move an engine to where a server looks for the model `name`, and write its config."""
    folder = repository / "models" / name
    write_atomically(folder / "config.pbtxt", config_text(name, file, facts).encode())
    (folder / "1").mkdir()  # a version; Triton loads no model without one
    shutil.move(file.path, folder / "1" / SERVERS[file.backend].file)
    # ONNX files name the file of their weights relative to themselves, so it goes into the same folder.
    if data_path(file.path).exists():
        shutil.move(data_path(file.path), folder / "1" / data_path(file.path).name)


def config_text(name: str, file: EngineFile, facts: Mapping[str, Any]) -> str:
    """Return a model's config as Triton reads it, protobuf text of its `ModelConfig`.

    Args:
        name: of the model.
        file: an engine whose tensors all have one row for each image.
        facts: JSON values that its client needs.

    Raises:
        GaqError: its smallest batch is not 1, or a tensor has no rows.
    """
    server = SERVERS[file.backend]
    # The server adds the batch dimension itself, so every tensor must have it.
    single = [spec.name for spec in (*file.inputs, *file.outputs) if spec.shape[:1] != (None,)]
    if single or file.batch[0] != 1:
        raise GaqError(
            f"A server needs batches from 1 on and a row for each image in every tensor; {file.path} starts at "
            f"{file.batch[0]} and has none of {single}."
        )
    return "\n".join(
        [
            f"name: {json.dumps(name)}",
            f'backend: "{server.backend}"',
            f"max_batch_size: {file.batch[2]}",
            *_tensors("input", file.inputs),
            *_tensors("output", file.outputs),
            f"instance_group [ {{ count: 1 kind: {server.kind} }} ]",
            # A request waits at most a millisecond for others to share its batch.
            f"dynamic_batching {{ preferred_batch_size: [ {file.batch[1]} ] max_queue_delay_microseconds: 1000 }}",
            *(
                # Triton's parameters are strings: JSON inside, quoted once more for the protobuf text.
                f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(json.dumps(value))} }} }}"
                for key, value in facts.items()
            ),
            "",
        ]
    )


def _tensors(what: str, specs: Sequence[TensorSpec]) -> list[str]:
    lines = []
    for spec in specs:
        inner = spec.shape[1:]  # (N, ...) -> (...): the config declares tensors without the batch
        dims = f"dims: [ {', '.join(map(str, inner))} ]" if inner else "dims: [ 1 ] reshape { shape: [ ] }"
        lines.append(f"  {{ name: {json.dumps(spec.name)} data_type: {TYPES[spec.dtype]} {dims} }}")
    return [f"{what} [", ",\n".join(lines), "]"]


def client_text() -> str:
    """Return the client as a stand-alone program; read as text, since importing it needs the client library."""
    text = Path(__file__).with_name("triton_client.py").read_text(encoding="utf-8")
    return text.replace("from engines import philox", "import philox")


def _conditioning_facts(conditioning: Conditioning | None, texts: TextEncoders | None) -> dict[str, Any]:
    """Return what the client needs to know about conditioning.

    Args:
        conditioning: of the model; None for an unconditional one.
        texts: the text encoders in the engine's record.

    Raises:
        GaqError: the model takes prompts, and there are no text encoders.
    """
    if conditioning is None:
        return {}
    guided = {"guidance": conditioning.guidance} if conditioning.guided else {}
    if conditioning.rows.keys() == {LABELS}:
        unconditional = {"unconditional": int(conditioning.unconditional[LABELS][0])} if conditioning.guided else {}
        return {"classes": conditioning.rows[LABELS].tolist(), **unconditional, **guided}
    if texts is None:
        raise GaqError(
            f"The network is conditioned on {sorted(conditioning.rows)}, and there are no text encoders in its model's "
            "folder, or transformers is not installed, so a client could not give it prompts."
        )
    # As diffusers names its folders: text_encoder, text_encoder_2. Triton's models: text, text-2.
    names = [TEXT if index == 0 else f"{TEXT}-{index + 1}" for index in range(len(texts.engines))]
    encoding = {"zeros": texts.zeros, "time_ids": texts.time_ids}
    return {"prompts": list(conditioning.names), "texts": names, **encoding, **guided}


def _readme(built: Built) -> str:
    record = record_of(built.file)
    server = SERVERS[built.file.backend]
    spec = record.provenance.sampler
    needs = "'tritonclient[http]' numpy pillow" + (" tokenizers" if built.texts else "")
    return f"""# {plain(record.provenance.name)}, {record.bits}, on a Triton Inference Server

`models/` is a model repository whose model `{NAME}` is a denoising step ({spec}). Start a server that has the
{server.backend} backend:

    tritonserver --model-repository models

and draw with `client.py`, which runs the loop: noise by seed, {spec.steps} requests, PNGs.

    pip install {needs}
    python client.py --url localhost:8000 --num 4 --seed 0 --out samples

Inputs and outputs of a step are in `models/{NAME}/config.pbtxt`. What a step puts out goes into the next: `x_next` to
`x`, `step_next` to `step`, `clean` to `previous`; `noise` is fresh at each. Images of one batch may be at different
steps, so the server's batcher may put clients together. A TensorRT engine needs a server with the TensorRT and the kind
of GPU that it was built with.
{_beside(built)}"""


def _beside(built: Built) -> str:
    """Return a paragraph about the other models of the repository, "" if there are none."""
    sentences = []
    if built.decoder is not None:
        sentences.append(f"What the loop ends with are latents; the model `{DECODER}` makes images of them.")
    if built.texts:
        sentences.append(f"Prompts go through `{TEXT}` first; give your own, one a line, with `--prompts FILE`.")
    return f"\n{' '.join(sentences)}\n" if sentences else ""
