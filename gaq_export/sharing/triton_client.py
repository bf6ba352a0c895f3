"""Draw with denoising steps on a Triton Inference Server: the loop, one request a step.

    python client.py --url localhost:8000 --num 4 --seed 0 --out samples

Needs numpy, pillow, `pip install tritonclient[http]`, and tokenizers for a model that takes prompts. Everything else
about the model is in the server's config, except the tokenizers' files, which lie beside this program. An image's noise
depends on its seed alone, so the server may put requests of any clients together, with images at different steps.
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
    """Draw one image for each seed, in batches that the server takes; seed s draws class or prompt s mod K of K.

    Args:
        client: of the server.
        model: its name there.
        seeds: one for each image.
        guidance: scale of classifier-free guidance, if the model has it; the scale in its config if None.
        prompts: what to draw, if the model takes prompts; the prompts in its config if None.
        words: folder with the tokenizers' files.

    Returns:
        (N, C, H, W) in [-1, 1].
    """
    config = client.get_model_config(model)
    # A parameter is a string by Triton's protocol, so numbers and lists are JSON in it.
    parameters = {name: json.loads(value["string_value"]) for name, value in config["parameters"].items()}
    rows, unconditional = _rows(client, parameters, prompts, words)
    most = int(config["max_batch_size"])
    parts = []
    for i in range(0, len(seeds), most):
        batch = seeds[i : i + most]
        condition = {name: row[[seed % len(row) for seed in batch]] for name, row in rows.items()}
        if "guidance" in parameters:
            scale = parameters["guidance"] if guidance is None else guidance
            condition |= {f"unconditional_{name}": np.repeat(row, len(batch), 0) for name, row in unconditional.items()}
            # (N, 1): a tensor of Triton's has a batch and at least one more dimension.
            condition["guidance"] = np.full((len(batch), 1), scale, np.float32)
        parts.append(_loop(client, config, parameters["steps"], batch, condition))
    images = np.concatenate(parts)
    if "decoder" in parameters:  # what the loop ends with are latents
        images = _through(client, parameters["decoder"], {"latents": images})["images"]
    return images.clip(-1, 1)


def _loop(client: Client, config: dict[str, Any], steps: int, seeds: Sequence[int], condition: Arrays) -> Array:
    """Run all steps for one batch; what a step puts out goes into the next."""
    shapes = {tensor["name"]: tuple(int(size) for size in tensor["dims"]) for tensor in config["input"]}
    outputs = [tensor["name"] for tensor in config["output"] if tensor["name"] in FEEDBACK]
    feeds = condition | {
        "x": philox.normals(seeds, 0, shapes["x"]),
        # (N, 1) int64: the index of the step, a row for each image.
        "step": np.zeros((len(seeds), 1), np.int64),
        "previous": np.zeros((len(seeds), *shapes["x"]), np.float32),
    }
    for step in range(steps):
        if "noise" in shapes:
            # Stream 0 is where the loop starts, so the noise of step s is stream s + 1.
            feeds["noise"] = philox.normals(seeds, step + 1, shapes["noise"])
        results = _infer(client, config, {name: feeds[name] for name in shapes}, outputs)
        feeds |= {FEEDBACK[name]: array for name, array in results.items()}
    return feeds["x"]


def _rows(
    client: Client, parameters: dict[str, Any], prompts: Sequence[str] | None, words: Path
) -> tuple[Arrays, Arrays]:
    """Return all conditions, (K, ...), and the unconditional one, (1, ...), by the inputs' names."""
    if "classes" in parameters:
        label = parameters.get("unconditional")
        unconditional = {} if label is None else {"class_labels": np.array([[label]])}
        return {"class_labels": np.array(parameters["classes"], np.int64).reshape(-1, 1)}, unconditional  # (K, 1)
    if "texts" not in parameters:
        return {}, {}
    rows = _encoded(client, parameters, parameters["prompts"] if prompts is None else prompts, words)
    unconditional = _encoded(client, parameters, [""], words)
    # Where the pipeline's force_zeros_for_empty_prompt says so; the size conditioning stays.
    if parameters["zeros"]:
        unconditional |= {name: np.zeros_like(row) for name, row in unconditional.items() if name != "time_ids"}
    return rows, unconditional


def _encoded(client: Client, parameters: dict[str, Any], prompts: Sequence[str], words: Path) -> Arrays:
    """Return prompts as the network takes them, encoded by the text encoders on the server."""
    from tokenizers import Tokenizer

    encoded = []
    for name in parameters["texts"]:
        tokenizer = Tokenizer.from_file(str(words / f"{name}.tokens.json"))
        ids = np.array([tokens.ids for tokens in tokenizer.encode_batch(list(prompts))], np.int64)
        encoded.append(_through(client, name, {"ids": ids}))
    # The encoders' states side by side: (K, tokens, width)
    rows = {"encoder_hidden_states": np.concatenate([arrays["states"] for arrays in encoded], -1)}
    if parameters["time_ids"] is not None:
        times = np.array(parameters["time_ids"], np.float32)
        rows |= {"text_embeds": encoded[-1]["pooled"], "time_ids": np.repeat(times, len(prompts), 0)}
    return rows


def _through(client: Client, model: str, feeds: Arrays) -> Arrays:
    """Run a model once on all rows, in batches that the server takes."""
    config = client.get_model_config(model)
    most = int(config["max_batch_size"])
    names = [tensor["name"] for tensor in config["output"]]
    count = len(next(iter(feeds.values())))
    parts = [
        _infer(client, config, {name: array[i : i + most] for name, array in feeds.items()}, names)
        for i in range(0, count, most)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _infer(client: Client, config: dict[str, Any], feeds: Arrays, outputs: Sequence[str]) -> Arrays:
    types = {tensor["name"]: tensor["data_type"].removeprefix("TYPE_") for tensor in config["input"]}
    inputs = [InferInput(name, list(array.shape), types[name]) for name, array in feeds.items()]
    for tensor in inputs:
        tensor.set_data_from_numpy(np.ascontiguousarray(feeds[tensor.name()]))
    requested = [InferRequestedOutput(name, binary_data=True) for name in outputs]
    answer = client.infer(config["name"], inputs, outputs=requested)
    return {name: answer.as_numpy(name) for name in outputs}


def main() -> None:
    """Draw, and write one PNG for each image."""
    parser = argparse.ArgumentParser(description="Draw with a Triton Inference Server.")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", default="unet")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line, for a model that takes prompts")
    parser.add_argument("--out", type=Path, default=Path("samples"))
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.num)
    lines = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else []
    prompts = [line.strip() for line in lines if line.strip()] or None
    with Client(options.url) as client:
        images = draw(client, options.model, seeds, options.guidance, prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        pixels = ((image + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(options.out / f"{seed:06d}.png")


if __name__ == "__main__":
    main()
