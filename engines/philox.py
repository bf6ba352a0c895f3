"""Normal noise as a function of seed, stream and position, so that any machine can draw any part of it at any time.

Philox4x64-10 (Salmon et al. 2011, as in NumPy) keyed with the seed; the stream is the second word of its counter. Each
64-bit word gives two normals by Box and Muller (1958): its upper half the radius, its lower half the angle. So the
noise of an image does not depend on its batch, on earlier draws, or on the device: `philox.ptx` is the same on a GPU.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def normals(seeds: Sequence[int], stream: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """Draw standard normal noise.

    Args:
        seeds: One for each row, taken modulo 2^64.
        stream: Number of the draw, from 0.
        shape: Shape of a row.

    Returns:
        (len(seeds), *shape) float32.
    """
    count = int(np.prod(shape))
    words = np.stack([_words(seed, stream, (count + 1) // 2) for seed in seeds])  # (N, ceil(count / 2)) uint64
    # Half a unit is added so that the logarithm never sees 0.
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = 2 * np.pi * (words & np.uint64(0xFFFFFFFF)) * 2.0**-32
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)  # (N, words, 2)
    # Rounded to float32 only at the end; an odd count drops the last sine.
    return pairs.reshape(len(words), -1)[:, :count].astype(np.float32).reshape(len(words), *shape)


def _words(seed: int, stream: int, count: int) -> npt.NDArray[np.uint64]:
    generator = np.random.Philox(key=seed % 2**64, counter=[0, stream, 0, 0])
    return generator.random_raw(count)
