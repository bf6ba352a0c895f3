"""Write what an engine drew as arrays, where its channels are not those of a picture.

OUT/images.npz     images (N, C, H, W) float32, seeds (N,) int64 [, float (N, C, H, W) of the float model]
OUT/samples.json   all that is needed to draw them again
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from calib.files import write_atomically
from calib.records import signed
from engines import EngineFile
from gaq_export import images
from gaq_export.deploy.record import record_of
from gaq_export.diffusion.loop import Sampling
from gaq_export.sampling.png_folder import Drawn, Sampled, image_facts

NAME = "images.npz"


def write_arrays(out: Path, file: EngineFile, sampling: Sampling, drawn: Drawn) -> Sampled:
    """Write the arrays and samples.json; no value is rounded or clamped."""
    arrays: dict[str, Any] = {"images": drawn.images.numpy(), "seeds": np.array(drawn.seeds, dtype=np.int64)}
    psnr = None
    if drawn.reference is not None:
        arrays["float"] = drawn.reference.numpy()
        psnr = tuple(images.psnr(drawn.images, drawn.reference).tolist())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(out / NAME, buffer.getvalue())
    # Last: a folder with samples.json has its arrays.
    rows = [
        {"seed": seed} | ({} if psnr is None else {"psnr_db": round(psnr[i], 3)}) for i, seed in enumerate(drawn.seeds)
    ]
    record = {**image_facts(file, sampling), "seconds": round(drawn.seconds, 3), "arrays": NAME, "images": rows}
    write_atomically(out / "samples.json", signed(record))
    return Sampled(
        images=drawn.images,
        seeds=drawn.seeds,
        psnr_db=psnr,
        seconds=drawn.seconds,
        folder=out,
        grid=None,
        arrays=out / NAME,
        random_weights=record_of(file).provenance.random_weights,
    )
