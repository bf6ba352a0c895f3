"""Train the small digit classifier whose features score pictures of digits (`--features digits`), in about a minute.

    python examples/train_digits.py --data mnist.npz --out digits.safetensors

In: an .npz with `train_images` (N, 28, 28) uint8, `train_labels` (N,), `test_images` and `test_labels`. Out: its
weights, for `gaq-export evaluate --features digits=digits.safetensors`. The ones in the package were made this way.
"""

from pathlib import Path
from typing import Annotated

import typer

from gaq_export.evaluation import frechet

SHAPE = (1, 32, 32)


def main(
    data: Annotated[Path, typer.Option(help=".npz of digits.")],
    out: Annotated[Path, typer.Option(help="File to write; one that is there is only tested.")],
) -> None:
    """Train and test the classifier."""
    net = frechet.digit_net(out, data, SHAPE)
    test = frechet.load_images(data, "test", SHAPE)
    right = frechet.accuracy(net, frechet.features(net, test.images), test.labels)
    print(f"{right:.4f} of {len(test.labels)} test digits right -> {out}")


if __name__ == "__main__":
    typer.run(main)
