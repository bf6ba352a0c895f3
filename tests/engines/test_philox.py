"""Noise is normal, depends on seed and stream alone, and is to the bit what the GPU's kernel computes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import engines
from engines.philox import normals

KERNEL = Path(engines.__file__).with_name("philox.cu")
FILL = """
void fill(float *out, word seed, word stream, word count) {
    for (word pair = 0; pair < (count + 1) / 2; ++pair) {
        float first, second;
        normal_pair(philox_word(seed, stream, pair), &first, &second);
        out[2 * pair] = first;
        if (2 * pair + 1 < count) out[2 * pair + 1] = second;
    }
}
"""


def test_a_rows_noise_is_the_same_in_any_company() -> None:
    together = normals([5, 6, 7], 3, (1, 4, 4))
    assert np.array_equal(together[1:2], normals([6], 3, (1, 4, 4)))
    assert np.array_equal(together[1].ravel()[:5], normals([6], 3, (5,))[0])


def test_seeds_and_streams_give_noise_that_has_nothing_in_common() -> None:
    rows = np.stack([normals([seed], stream, (4000,))[0] for seed in (0, 1) for stream in (0, 1)])
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.05


def test_it_is_normal() -> None:
    values = normals(range(8), 0, (20_001,)).astype(float).ravel()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    assert abs((values > 1.96).mean() - 0.025) < 0.002


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.parametrize("seed", [0, 5, -1, 2**63 + 11])
def test_the_gpu_kernel_compiled_for_this_cpu_draws_the_same_bits(seed: int, tmp_path: Path) -> None:
    source, library = tmp_path / "fill.c", tmp_path / "fill.so"
    source.write_text(f'#include "{KERNEL}"\n{FILL}')
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"], check=True)
    out = np.zeros(3 * 17 * 5, np.float32)
    numbers = [ctypes.c_ulonglong(n) for n in (seed % 2**64, 7, out.size)]
    ctypes.CDLL(str(library)).fill(out.ctypes.data_as(ctypes.c_void_p), *numbers)
    assert np.array_equal(out, normals([seed], 7, (3, 17, 5)).ravel())
