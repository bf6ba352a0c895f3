"""Ways to damage a file: its bytes, the tree of a JSON object, the tensors of safetensors, the images in an .npz.

In: a file and a `random.Random`. Out: the file, changed in place, and a few words about how. The same generator gives
the same damage.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Mutation = Callable[[Path, Random], str]
DEPTH = 100_000  # deeper than any parser's stack
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    2.5,
    10**9,
    10**30,
    -(10**18),
    float("nan"),
    float("inf"),
    "",
    "x",
    "3",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    [],
    {},
    [1, 2, 3],
    {"x": 1},
    [[[]]],
    ["x"] * 1000,
)


def bytes_of(file: Path, random: Random) -> str:
    """Damage bytes, whatever they mean."""
    content = bytearray(file.read_bytes())
    kind = random.choice(["empty", "cut", "flip", "flip", "flip", "zeros", "noise", "longer", "folder", "link"])
    place = random.randrange(max(1, len(content)))
    match kind:
        case "empty":
            content.clear()
        case "cut":
            del content[place:]
        case "flip" if content:
            content[place] ^= 1 << random.randrange(8)
        case "zeros":
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        case "noise":
            content[:] = random.randbytes(len(content))
        case "longer":
            content += random.randbytes(100)
        case "folder" | "link":
            file.unlink()
            if kind == "folder":
                file.mkdir()
            else:
                file.symlink_to(file.with_name("nowhere"))
            return f"a {kind} in its place"
    file.write_bytes(content)
    return f"{kind} at byte {place}"


def json_of(file: Path, random: Random) -> str:
    """Change one place in a JSON tree: another value, a key or an item less or more, or nesting without end."""
    tree = json.loads(file.read_bytes())
    text, how = changed_tree(tree, random)
    file.write_text(text, encoding="utf-8")
    return how


def changed_tree(tree: Any, random: Random) -> tuple[str, str]:
    """Return a JSON tree with one change as text, and the change in words."""
    places = list(_places(tree, ()))
    where = random.choice(places) if places else ()
    name = ".".join(map(str, where)) or "the whole"
    kind = random.choice(["value", "value", "value", "drop", "key", "deep", "repeat"])
    if not where or kind == "deep":
        if random.random() < 0.5 or not where:
            value = random.choice(VALUES)
            return json.dumps(value), f"the whole is {_short(value)}"
        mark = "@deep@"
        _set(tree, where, mark)
        text = json.dumps(tree).replace(f'"{mark}"', "[" * DEPTH + "]" * DEPTH)
        return text, f"{name} is nested {DEPTH} deep"
    match kind:
        case "value":
            value = random.choice(VALUES)
            _set(tree, where, value)
            how = f"{name} is {_short(value)}"
        case "drop":
            _drop(tree, where)
            how = f"{name} is gone"
        case "key":
            parent = _get(tree, where[:-1])
            if isinstance(parent, dict):
                parent["unheard-of"] = random.choice(VALUES)
            else:
                parent.append(random.choice(VALUES))
            how = f"one more beside {name}"
        case _:
            value = _get(tree, where)
            _set(tree, where, [value, value])
            how = f"{name} twice, in a list"
    return json.dumps(tree), how


def tensors_of(file: Path, random: Random) -> str:
    """Change one tensor of a safetensors file and leave its header as it was."""
    with safe_open(str(file), framework="pt") as opened:
        header = opened.metadata() or {}
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = random.choice(sorted(tensors))
    value = tensors[name]
    kind = random.choice(["gone", "renamed", "another type", "another shape", "NaN", "one value", "shorter", "header"])
    match kind:
        case "gone":
            del tensors[name]
        case "renamed":
            tensors[f"{name}x"] = tensors.pop(name)
        case "another type":
            tensors[name] = value.to(random.choice([torch.float64, torch.bfloat16, torch.int64, torch.uint8]))
        case "another shape":
            tensors[name] = value.reshape(1, *value.shape)
        case "NaN":
            tensors[name] = torch.full_like(value, torch.nan) if value.is_floating_point() else torch.zeros_like(value)
        case "one value" if value.numel():
            flat = value.flatten().clone()
            flat[random.randrange(len(flat))] += 1
            tensors[name] = flat.reshape(value.shape)
        case "shorter" if value.dim() and len(value) > 1:
            tensors[name] = value[:-1].contiguous()
        case "header" if header:
            key = random.choice(sorted(header))
            header[key] = random.choice(["", "x", "{}", "[]", "null", "0" * 64, "[" * DEPTH])
            name = key
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, header)
    return f"{name}: {kind}"


def arrays_of(file: Path, random: Random) -> str:
    """Write other arrays into an .npz of images."""
    with np.load(file) as opened:
        images = opened["train_images"]
    others: dict[str, Any] = {
        "no images": images[:0],
        "one image": images[:1],
        "no height": images[:, :0],
        "a number": np.uint8(3),
        "one axis": images.reshape(-1),
        "two axes": images.reshape(len(images), -1),
        "five axes": images[None],
        "seven channels": np.repeat(images, 7, -1)[..., :7],
        "floats": images.astype(np.float32),
        "not finite": np.full(images.shape, np.nan),
        "objects": np.array([{"a": 1}], dtype=object),
        "words": np.array(["x", "y"]),
        "wide integers": images.astype(np.int64),
    }
    kind = random.choice(sorted(others))
    np.savez(file, **{random.choice(["train_images", "train_images", "images", "x"]): others[kind]})
    return kind


def pictures_of(file: Path, random: Random) -> str:
    """Put something else in the place of a picture, or beside it."""
    kind = random.choice(["pipe", "folder", "text", "bomb", "another size", "link to itself"])
    beside = file.with_name("zz.png")
    match kind:
        case "pipe":
            os.mkfifo(beside)
        case "folder":
            beside.mkdir()
        case "text":
            beside.write_text("no picture")
        case "bomb":
            beside.write_bytes(_png_header(60_000, 60_000) + file.read_bytes()[33:])
        case "another size":
            beside.write_bytes(_png_header(7, 9) + file.read_bytes()[33:])
        case _:
            beside.symlink_to(beside)
    return kind


def missing(file: Path, random: Random) -> str:
    """Remove the file."""
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    return "gone"


def _png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        # A few of a long list's items stand for all of them.
        if not isinstance(tree, list) or key < 3:
            yield from _places(value, (*path, key))


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    _get(tree, path[:-1])[path[-1]] = value


def _drop(tree: Any, path: tuple[Any, ...]) -> None:
    del _get(tree, path[:-1])[path[-1]]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
