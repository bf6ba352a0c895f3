"""The client's loop against a server of a few lines: what it sends at each step, and what becomes of the answers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import philox
from gaq_export.sharing import triton_client

SHAPE = (1, 4, 4)


class Answer:
    """Arrays of one request, as the client library hands them out."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def as_numpy(self, name: str) -> np.ndarray:
        return self._arrays[name]


class Server:
    """A server whose step halves x, and that remembers what it was sent."""

    def __init__(self, largest: int = 2, **parameters: Any) -> None:
        self.largest = largest
        self.parameters = {"steps": 3, **parameters}
        self.requests: list[dict[str, np.ndarray]] = []

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_model_config(self, model: str) -> dict[str, Any]:
        if model == "decoder":
            inputs, outputs = {"latents": SHAPE}, ("images",)
        else:
            inputs, outputs = {"x": SHAPE, "step": (1,), "noise": SHAPE}, ("x_next", "step_next")
            if "classes" in self.parameters:
                inputs |= {"class_labels": (1,), "unconditional_class_labels": (1,), "guidance": (1,)}
        types = {"step": "TYPE_INT64", "class_labels": "TYPE_INT64", "unconditional_class_labels": "TYPE_INT64"}
        return {
            "name": model,
            "max_batch_size": self.largest,
            "input": [
                {"name": n, "dims": list(map(str, dims)), "data_type": types.get(n, "TYPE_FP32")}
                for n, dims in inputs.items()
            ],
            "output": [{"name": n} for n in outputs],
            "parameters": {n: {"string_value": json.dumps(value)} for n, value in self.parameters.items()},
        }

    def infer(self, model: str, inputs: list[Any], outputs: list[Any]) -> Answer:
        kinds = {"FP32": np.float32, "INT64": np.int64}
        feeds = {
            tensor.name(): np.frombuffer(tensor._get_binary_data(), kinds[tensor.datatype()]).reshape(tensor.shape())
            for tensor in inputs
        }
        if model == "decoder":
            return Answer({"images": np.full_like(feeds["latents"], 3.0)})
        self.requests.append(feeds)
        return Answer({"x_next": feeds["x"] / 2, "step_next": feeds["step"] + 1})


def test_each_batch_runs_all_steps_with_the_noise_of_its_seeds() -> None:
    server = Server()
    images = triton_client.draw(server, "unet", [5, 6, 7])
    assert [len(request["x"]) for request in server.requests] == [2, 2, 2, 1, 1, 1]
    assert [int(request["step"][0, 0]) for request in server.requests] == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(server.requests[1]["noise"], philox.normals([5, 6], 2, SHAPE))
    expected = (philox.normals([5, 6, 7], 0, SHAPE) / 8).clip(-1, 1)
    assert np.allclose(images, expected)


def test_an_image_has_the_class_of_its_seed_and_the_guidance_asked_for() -> None:
    server = Server(classes=[1, 3], unconditional=9, guidance=2.0)
    triton_client.draw(server, "unet", [2, 3], guidance=5.0)
    request = server.requests[0]
    assert request["class_labels"].tolist() == [[1], [3]]
    assert request["unconditional_class_labels"].tolist() == [[9], [9]]
    assert request["guidance"].tolist() == [[5.0], [5.0]]


def test_latents_go_through_the_decoder_and_are_clipped() -> None:
    images = triton_client.draw(Server(decoder="decoder"), "unet", [0])
    assert np.array_equal(images, np.ones((1, *SHAPE)))


def test_the_program_writes_one_png_for_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_client, "Client", lambda url: Server())
    monkeypatch.setattr(sys, "argv", ["client.py", "--num", "2", "--seed", "7", "--out", str(tmp_path / "out")])
    triton_client.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000007.png", "000008.png"]
    with Image.open(tmp_path / "out" / "000007.png") as picture:
        expected = (philox.normals([7], 0, SHAPE)[0, 0] / 8 + 1) * 127.5
        assert np.array_equal(np.array(picture), expected.round().astype(np.uint8))
