"""A model repository for a Triton Inference Server: denoising steps as its model, the loop as its client.

    models/unet/config.pbtxt, models/unet/1/model.onnx or model.plan
    models/decoder/...                   of latents, if it draws such
    models/text/..., models/text-2/...   encoders of prompts, if it is told such
    client.py, philox.py, text.tokens.json ..., README.md

In this graph every image has a step of its own, (N,), so that the server's batcher may put together what clients ask
for at different steps. Triton's tensors have a batch and at least one more dimension, so (N,) is given as (N, 1), with
a `reshape`. Numbers that the loop needs are parameters of the model's config, which the client asks the server for.
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
from gaq_export import run as runs
from gaq_export.deploy.build import BuildOptions, Built, build
from gaq_export.deploy.record import TextEncoders, record_of
from gaq_export.diffusion.conditioning import LABELS, Conditioning
from gaq_export.diffusion.schedule import SamplerSpec
from gaq_export.errors import GaqError
from gaq_export.models.loader import LoadedModel
from gaq_export.models.provenance import load_conditioning, provenance_of
from gaq_export.run import Run

MARK = "client.py"
NAME, DECODER, TEXT = "unet", "decoder", "text"


@dataclass(frozen=True, kw_only=True)
class Server:
    """How Triton runs the engines of one of our backends: its backend, the model's file, and where."""

    backend: str
    file: str
    kind: str


SERVERS: Mapping[str, Server] = {
    "onnxruntime": Server(backend="onnxruntime", file="model.onnx", kind="KIND_CPU"),
    "onnxruntime-cuda": Server(backend="onnxruntime", file="model.onnx", kind="KIND_GPU"),
    "tensorrt": Server(backend="tensorrt", file="model.plan", kind="KIND_GPU"),
}
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


def write(
    folder: str | Path,
    out: str | Path,
    *,
    backend: str = "onnxruntime",
    most: int = 16,
    sampler: SamplerSpec | None = None,
    model: LoadedModel | None = None,
) -> Path:
    """Build the steps, check them against PyTorch, and write the repository with its client.

    Args:
        folder: run folder with a finished plan.
        out: the folder; a repository that is there is replaced.
        backend: a key of `SERVERS`.
        most: images that the server may put together.
        sampler: whose steps; the plan's if None.
        model: the float model; found again from the plan if None.

    Raises:
        GaqError, CalibError, EngineError: what `build_engine` raises; a plan that one model of steps cannot serve; a
            place that is taken.
    """
    run, out = Run(folder=Path(folder)), Path(out)
    if backend not in SERVERS:
        raise GaqError(f"A Triton server has no backend for {backend!r}. Choose one of {list(SERVERS)}.")
    runs.check_replaceable(out, MARK)
    plan, server = load_plan(run.plan), SERVERS[backend]
    if len(widths(plan)) > 1:
        raise GaqError(
            "Steps differ in activation bits in this plan, so they are several engines: it cannot be served."
        )
    conditioning = load_conditioning(provenance_of(plan), run.folder)
    config = EngineConfig(backend=backend, batch=(1, min(4, most), most))
    with runs.staging(out) as staged:
        engine, made = staged / "engine" / server.file, staged / "repository"
        engine.parent.mkdir()
        options = BuildOptions(config=config, sampler=sampler, rows=True, step_name="triton")
        built = build(run, engine, options, model)
        record = record_of(built.file)
        spec, texts = record.provenance.sampler, record.text_encoders
        known = {"steps": spec.steps, "sampler": str(spec), **_conditioning_facts(conditioning, texts)}
        if built.decoder is not None:
            known |= {"decoder": DECODER}
            _install(DECODER, built.decoder.file, made, {})
        tokens = [] if texts is None else [engine.with_name(each.file) for each in texts.tokenizers]
        for name, part, words in zip(known.get("texts", ()), built.texts, tokens, strict=True):
            _install(name, part.file, made, {})
            shutil.move(words, made / f"{name}.tokens.json")
        _install(NAME, built.file, made, known)
        write_atomically(made / MARK, client_text().encode())
        write_atomically(made / "philox.py", inspect.getsource(philox).encode())
        write_atomically(made / "README.md", _readme(built, spec).encode())
        runs.replace_folder(made, out)
    return out


def _install(name: str, file: EngineFile, repository: Path, known: Mapping[str, Any]) -> None:
    """Move an engine to where a server looks for the model `name`, and write its config."""
    folder = repository / "models" / name
    write_atomically(folder / "config.pbtxt", config_text(name, file, known).encode())
    (folder / "1").mkdir()
    shutil.move(file.path, folder / "1" / SERVERS[file.backend].file)
    if data_path(file.path).exists():
        shutil.move(data_path(file.path), folder / "1" / data_path(file.path).name)


def config_text(name: str, file: EngineFile, known: Mapping[str, Any]) -> str:
    """Return a model's config as Triton reads it, protobuf text of its `ModelConfig`.

    Args:
        name: of the model.
        file: an engine all of whose tensors have rows.
        known: JSON values that its client has to know.

    Raises:
        GaqError: its smallest batch is not 1, or a tensor has no rows.
    """
    server = SERVERS[file.backend]
    single = [spec.name for spec in (*file.inputs, *file.outputs) if spec.shape[:1] != (None,)]
    if single or file.batch[0] != 1:
        raise GaqError(
            f"A server's batches start at 1 and have a row of everything for each image; {file.path} starts at "
            f"{file.batch[0]} and has none of {single}."
        )
    return "\n".join(
        [
            f'name: "{name}"',
            f'backend: "{server.backend}"',
            f"max_batch_size: {file.batch[2]}",
            *_tensors("input", file.inputs),
            *_tensors("output", file.outputs),
            f"instance_group [ {{ count: 1 kind: {server.kind} }} ]",
            f"dynamic_batching {{ preferred_batch_size: [ {file.batch[1]} ] max_queue_delay_microseconds: 1000 }}",
            *(
                f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(json.dumps(value))} }} }}"
                for key, value in known.items()
            ),
            "",
        ]
    )


def _tensors(what: str, specs: Sequence[TensorSpec]) -> list[str]:
    lines = []
    for spec in specs:
        inner = spec.shape[1:]
        dims = f"dims: [ {', '.join(map(str, inner))} ]" if inner else "dims: [ 1 ] reshape { shape: [ ] }"
        lines.append(f'  {{ name: "{spec.name}" data_type: {TYPES[spec.dtype]} {dims} }}')
    return [f"{what} [", ",\n".join(lines), "]"]


def client_text() -> str:
    """Return the client as a program of its own, beside `philox.py`; read, since importing it asks for its library."""
    text = Path(__file__).with_name("triton_client.py").read_text(encoding="utf-8")
    return text.replace("from engines import philox", "import philox")


def _conditioning_facts(conditioning: Conditioning | None, texts: TextEncoders | None) -> dict[str, Any]:
    """Return what the client has to know of what images are told; `texts` is what the engine's record says of them."""
    if conditioning is None:
        return {}
    guided = {"guidance": conditioning.guidance} if conditioning.guided else {}
    if conditioning.rows.keys() == {LABELS}:
        unconditional = {"unconditional": int(conditioning.unconditional[LABELS][0])} if conditioning.guided else {}
        return {"classes": conditioning.rows[LABELS].tolist(), **unconditional, **guided}
    if texts is None:
        raise GaqError(
            f"The network is conditioned on {sorted(conditioning.rows)}, and there are no text encoders in its model's "
            "folder, or transformers is not installed: a client could give it no prompts."
        )
    names = [TEXT if index == 0 else f"{TEXT}-{index + 1}" for index in range(len(texts.engines))]
    kept = {"zeros": texts.zeros, "time_ids": texts.time_ids}
    return {"prompts": list(conditioning.names), "texts": names, **kept, **guided}


def _readme(built: Built, spec: SamplerSpec) -> str:
    record, server = record_of(built.file), SERVERS[built.file.backend]
    needs = "'tritonclient[http]' numpy pillow" + (" tokenizers" if built.texts else "")
    return f"""# {record.provenance.name}, {record.bits}, on a Triton Inference Server

`models/` is a model repository whose model `{NAME}` is a denoising step ({spec}). Start a server that has the
{server.backend} backend:

    tritonserver --model-repository models

and draw with `client.py`, which runs the loop: noise by seed, {spec.steps} requests, PNGs.

    pip install {needs}
    python client.py --url localhost:8000 --num 4 --seed 0 --out samples

Inputs and outputs of a step are in `models/{NAME}/config.pbtxt`. What a step puts out goes into the next: `x_next` to
`x`, `step_next` to `step`, `clean` to `previous`; `noise` is fresh at each. Every image of a batch may be at a step of
its own, so the server's batcher may put clients together. A TensorRT plan needs a server with the TensorRT and the kind
of GPU that it was built with.
{_beside(built)}"""


def _beside(built: Built) -> str:
    """Say what other models are there."""
    said = ""
    if built.decoder is not None:
        said += f"What the loop ends with are latents; the model `{DECODER}` makes images of them. "
    if built.texts:
        said += f"Prompts go through `{TEXT}` first; give your own, one a line, with `--prompts FILE`. "
    return said and f"\n{said.rstrip()}\n"
