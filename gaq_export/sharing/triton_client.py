"""Draw with denoising steps on a Triton Inference Server: the loop, one request a step.

    python client.py --url localhost:8000 --num 4 --seed 0 --out samples

Needs numpy, pillow, `pip install tritonclient[http]`, and tokenizers for a model that is told prompts. Everything else
about the model is in the server's own config of it, but for the tokenizers' words, which lie beside this file. An
image's noise depends on its seed alone, so the server may put requests of any clients together, each image at a step of
its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tritonclient.http import InferenceServerClient as Client
from tritonclient.http import InferInput, InferRequestedOutput

from engines import philox

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
HERE = Path(__file__).parent
# Output of a step -> the input of the next that it becomes.
FEEDBACK = {"x_next": "x", "step_next": "step", "clean": "previous"}


def draw(
    client: Client,
    model: str,
    seeds: Sequence[int],
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    words: Path = HERE,
) -> Array:
    """Draw one image for each seed, in batches that the server takes; the image of seed s is told row s mod K of K.

    Args:
        client: of the server.
        model: its name there.
        seeds: one for each image.
        guidance: scale of classifier-free guidance, if the model has it; its own if None.
        prompts: what to draw, if the model is told prompts; its own if None.
        words: folder with the tokenizers' files.

    Returns:
        (N, C, H, W) in [-1, 1].
    """
    config = client.get_model_config(model)
    known = {name: json.loads(value["string_value"]) for name, value in config["parameters"].items()}
    rows, unconditional = _rows(client, known, prompts, words)
    most, parts = int(config["max_batch_size"]), []
    for i in range(0, len(seeds), most):
        own = seeds[i : i + most]
        condition = {name: row[[seed % len(row) for seed in own]] for name, row in rows.items()}
        if "guidance" in known:
            condition |= {f"unconditional_{name}": np.repeat(row, len(own), 0) for name, row in unconditional.items()}
            condition["guidance"] = np.full(
                (len(own), 1), known["guidance"] if guidance is None else guidance, np.float32
            )
        parts.append(_loop(client, config, known["steps"], own, condition))
    found = np.concatenate(parts)
    if "decoder" in known:
        found = _through(client, known["decoder"], {"latents": found})["images"]
    return found.clip(-1, 1)


def _loop(client: Client, config: dict[str, Any], steps: int, seeds: Sequence[int], condition: Arrays) -> Array:
    """Run all steps for one batch; what a step puts out goes into the next."""
    shapes = {tensor["name"]: tuple(int(size) for size in tensor["dims"]) for tensor in config["input"]}
    kept = [tensor["name"] for tensor in config["output"] if tensor["name"] in FEEDBACK]
    feeds = condition | {
        "x": philox.normals(seeds, 0, shapes["x"]),
        "step": np.zeros((len(seeds), 1), np.int64),
        "previous": np.zeros((len(seeds), *shapes["x"]), np.float32),
    }
    for step in range(steps):
        if "noise" in shapes:
            feeds["noise"] = philox.normals(seeds, step + 1, shapes["noise"])
        found = _infer(client, config, {name: feeds[name] for name in shapes}, kept)
        feeds |= {FEEDBACK[name]: array for name, array in found.items()}
    return feeds["x"]


def _rows(client: Client, known: dict[str, Any], prompts: Sequence[str] | None, words: Path) -> tuple[Arrays, Arrays]:
    """Return what there is to draw, (K, ...), and what stands for nothing, (1, ...), by the inputs' names."""
    if "classes" in known:
        unconditional = {"class_labels": np.array([[known["unconditional"]]])} if "unconditional" in known else {}
        return {"class_labels": np.array(known["classes"], np.int64).reshape(-1, 1)}, unconditional
    if "texts" not in known:
        return {}, {}
    rows = _encoded(client, known, known["prompts"] if prompts is None else prompts, words)
    unconditional = _encoded(client, known, [""], words)
    if known["zeros"]:
        unconditional |= {name: np.zeros_like(row) for name, row in unconditional.items() if name != "time_ids"}
    return rows, unconditional


def _encoded(client: Client, known: dict[str, Any], prompts: Sequence[str], words: Path) -> Arrays:
    """Return what a network is told of prompts, by the text encoders on the server."""
    from tokenizers import Tokenizer

    found = []
    for name in known["texts"]:
        tokenizer = Tokenizer.from_file(str(words / f"{name}.tokens.json"))
        ids = np.array([tokens.ids for tokens in tokenizer.encode_batch(list(prompts))], np.int64)
        found.append(_through(client, name, {"ids": ids}))
    rows = {"encoder_hidden_states": np.concatenate([arrays["states"] for arrays in found], -1)}
    if known["time_ids"] is not None:
        times = np.array(known["time_ids"], np.float32)
        rows |= {"text_embeds": found[-1]["pooled"], "time_ids": np.repeat(times, len(prompts), 0)}
    return rows


def _through(client: Client, model: str, feeds: Arrays) -> Arrays:
    """Run a model once on all rows, in batches that the server takes."""
    config = client.get_model_config(model)
    most, names = int(config["max_batch_size"]), [tensor["name"] for tensor in config["output"]]
    count = len(next(iter(feeds.values())))
    parts = [
        _infer(client, config, {name: array[i : i + most] for name, array in feeds.items()}, names)
        for i in range(0, count, most)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _infer(client: Client, config: dict[str, Any], feeds: Arrays, outputs: Sequence[str]) -> Arrays:
    types = {tensor["name"]: tensor["data_type"].removeprefix("TYPE_") for tensor in config["input"]}
    asked = [InferInput(name, list(array.shape), types[name]) for name, array in feeds.items()]
    for tensor in asked:
        tensor.set_data_from_numpy(np.ascontiguousarray(feeds[tensor.name()]))
    wanted = [InferRequestedOutput(name, binary_data=True) for name in outputs]
    answer = client.infer(config["name"], asked, outputs=wanted)
    return {name: answer.as_numpy(name) for name in outputs}


def main() -> None:
    """Draw, and write one PNG for each image."""
    parser = argparse.ArgumentParser(description="Draw with a Triton Inference Server.")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", default="unet")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line, for a model that is told such")
    parser.add_argument("--out", type=Path, default=Path("samples"))
    asked = parser.parse_args()
    seeds = range(asked.seed, asked.seed + asked.num)
    lines = asked.prompts.read_text(encoding="utf-8").splitlines() if asked.prompts else []
    prompts = [line.strip() for line in lines if line.strip()] or None
    with Client(asked.url) as client:
        images = draw(client, asked.model, seeds, asked.guidance, prompts)
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        pixels = ((image + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(asked.out / f"{seed:06d}.png")


if __name__ == "__main__":
    main()
