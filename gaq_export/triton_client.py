"""Draw with denoising steps on a Triton Inference Server: the loop, one request a step.

    python client.py --url localhost:8000 --num 4 --seed 0 --out samples

Needs numpy, pillow and `pip install tritonclient[http]`. Everything else about the model is in the server's own config
of it. An image's noise depends on its seed alone, so the server may put requests of any clients together, each image
at a step of its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.http as triton
from PIL import Image

from engines import philox

Arrays = dict[str, npt.NDArray[Any]]
# Output of a step -> the input of the next that it becomes.
FEEDBACK = {"x_next": "x", "step_next": "step", "clean": "previous"}


def draw(
    client: triton.InferenceServerClient, model: str, seeds: Sequence[int], guidance: float | None = None
) -> npt.NDArray[np.float32]:
    """Draw one image for each seed, in batches that the server takes.

    Args:
        client: of the server.
        model: its name there.
        seeds: one for each image.
        guidance: scale of classifier-free guidance, if the model has it; its own if None.

    Returns:
        (N, C, H, W) in [-1, 1].
    """
    config = client.get_model_config(model)
    most = int(config["max_batch_size"])
    parts = [_draw(client, config, seeds[i : i + most], guidance) for i in range(0, len(seeds), most)]
    return np.concatenate(parts).clip(-1, 1)


def _draw(
    client: triton.InferenceServerClient, config: dict[str, Any], seeds: Sequence[int], guidance: float | None
) -> npt.NDArray[np.float32]:
    known = {name: json.loads(value["string_value"]) for name, value in config["parameters"].items()}
    types = {tensor["name"]: tensor["data_type"].removeprefix("TYPE_") for tensor in config["input"]}
    shapes = {t["name"]: (len(seeds), *(int(size) for size in t["dims"])) for t in config["input"]}
    fed_back = [tensor["name"] for tensor in config["output"] if tensor["name"] in FEEDBACK]
    feeds = _first(known, shapes, seeds, guidance)
    for step in range(known["steps"]):
        if "noise" in shapes:
            feeds["noise"] = philox.normals(seeds, step + 1, shapes["noise"][1:])
        asked = [triton.InferInput(name, list(shapes[name]), types[name]) for name in shapes]
        for tensor in asked:
            tensor.set_data_from_numpy(feeds[tensor.name()])
        answer = client.infer(
            config["name"], asked, outputs=[triton.InferRequestedOutput(name, binary_data=True) for name in fed_back]
        )
        feeds |= {FEEDBACK[name]: answer.as_numpy(name) for name in fed_back}
    images: npt.NDArray[np.float32] = feeds["x"]
    return images


def _first(
    known: dict[str, Any], shapes: dict[str, tuple[int, ...]], seeds: Sequence[int], guidance: float | None
) -> Arrays:
    """Return what the first step is given; what the image of a seed is told goes by the seed."""
    ones = np.ones((len(seeds), 1))
    feeds: Arrays = {
        "x": philox.normals(seeds, 0, shapes["x"][1:]),
        "step": np.zeros((len(seeds), 1), np.int64),
        "previous": np.zeros(shapes["x"], np.float32),
    }
    if "classes" in known:
        labels = [known["classes"][seed % len(known["classes"])] for seed in seeds]
        feeds["class_labels"] = np.array(labels, np.int64).reshape(-1, 1)
    if "nothing" in known:
        feeds["nothing_class_labels"] = (known["nothing"] * ones).astype(np.int64)
        feeds["guidance"] = ((known["guidance"] if guidance is None else guidance) * ones).astype(np.float32)
    return feeds


def main() -> None:
    """Draw, and write one PNG for each image."""
    parser = argparse.ArgumentParser(description="Draw with a Triton Inference Server.")
    parser.add_argument("--url", default="localhost:8000")
    parser.add_argument("--model", default="unet")
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance")
    parser.add_argument("--out", type=Path, default=Path("samples"))
    asked = parser.parse_args()
    seeds = range(asked.seed, asked.seed + asked.num)
    with triton.InferenceServerClient(asked.url) as client:
        images = draw(client, asked.model, seeds, asked.guidance)
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        pixels = ((image + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)  # (C, H, W) -> (H, W, C)
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(asked.out / f"{seed:06d}.png")


if __name__ == "__main__":
    main()
