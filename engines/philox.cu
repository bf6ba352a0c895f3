// Normal noise as engines/philox.py draws it, one thread for each 64-bit word of Philox4x64-10 (Salmon et al. 2011).
// `make kernels` compiles it to philox.ptx, which is what is loaded.

#ifndef __CUDACC__  // as plain C, for the test that compares it with NumPy
#include <math.h>
#define __device__
#define __umul64hi(a, b) ((unsigned long long)(((unsigned __int128)(a) * (b)) >> 64))
#endif

typedef unsigned long long word;

__device__ static word philox_word(word seed, word stream, word index) {
    word c[4] = {index / 4 + 1, stream, 0, 0}, k0 = seed, k1 = 0;  // NumPy counts before it draws
    for (int round = 0; round < 10; ++round) {
        word h0 = __umul64hi(0xD2E7470EE14C6C93ULL, c[0]), l0 = 0xD2E7470EE14C6C93ULL * c[0];
        word h1 = __umul64hi(0xCA5A826395121157ULL, c[2]), l1 = 0xCA5A826395121157ULL * c[2];
        c[0] = h1 ^ c[1] ^ k0;
        c[1] = l1;
        c[2] = h0 ^ c[3] ^ k1;
        c[3] = l0;
        k0 += 0x9E3779B97F4A7C15ULL;
        k1 += 0xBB67AE8584CAA73BULL;
    }
    return c[index % 4];
}

__device__ static void normal_pair(word bits, float *first, float *second) {
    double radius = sqrt(-2.0 * log(((double)(bits >> 32) + 0.5) * 0x1p-32));
    double angle = 6.283185307179586 * (double)(bits & 0xFFFFFFFFULL) * 0x1p-32;
    *first = (float)(radius * cos(angle));
    *second = (float)(radius * sin(angle));
}

#ifdef __CUDACC__
// Fills out (rows, count) with the noise of stream *iteration + 1.
extern "C" __global__ void normals(float *out, const word *seeds, const long long *iteration, word rows, word count) {
    word pairs = (count + 1) / 2, i = blockIdx.x * (word)blockDim.x + threadIdx.x;
    if (i >= rows * pairs) return;
    word row = i / pairs, pair = i % pairs;
    float first, second;
    normal_pair(philox_word(seeds[row], *iteration + 1, pair), &first, &second);
    out[row * count + 2 * pair] = first;
    if (2 * pair + 1 < count) out[row * count + 2 * pair + 1] = second;
}

extern "C" __global__ void advance(long long *iteration) { ++*iteration; }
#endif
