"""CUDA C of what eager torch takes dozens of passes over memory for: the scale search, and GPTQ within 128 columns.

The arithmetic is that of ``torch_search`` and ``gptq``, operation by operation: each is rounded by itself, and the sums
have the same order, so the results have the same bits. Bodies use no headers, which a driver alone does not bring.
"""

from __future__ import annotations

from typing import Final

_SHARED: Final = r"""
__device__ float rounded(float value, int kind) {  // 0 float32, 1 bfloat16, 2 float16, to nearest even
    if (kind == 1 && value == value) {
        unsigned bits = __float_as_uint(value);
        return __uint_as_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    }
    if (kind == 2) {
        unsigned short half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    }
    return value;
}

__device__ float widened(const void* values, long long at, int kind) {
    if (kind == 0) return ((const float*)values)[at];
    unsigned short bits = ((const unsigned short*)values)[at];
    if (kind == 1) return __uint_as_float((unsigned)bits << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <typename T> __device__ int position(T value, const T* bounds) {  // how many of 15 bounds it is above
    int found = value > bounds[7] ? 8 : 0;
    found += value > bounds[found + 3] ? 4 : 0;
    found += value > bounds[found + 1] ? 2 : 0;
    return found + (value > bounds[found] ? 1 : 0);
}
"""

SEARCH: Final = (
    _SHARED
    + r"""
__device__ float total(float one, float other) {  // by halves: 64 lanes, 32 of them in each argument
    float sum = __fadd_rn(one, other);
    for (int half = 16; half; half /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, half));
    return sum;
}

__device__ int total(int one, int other) {
    int sum = one + other;
    for (int half = 16; half; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
    return sum;
}

// A warp takes a block of 64 values, of which lane i has those at i and i + 32.
extern "C" __global__ void search(
    const void* values, int count, int kind, const float* bounds_, const float* levels_, const unsigned char* order,
    const int* cuts_, const float* inverses, int candidates, const float* tiled, const long long* first, int weighted,
    const float* limits, unsigned char* packed, float* scales, int blocks
) {
    __shared__ float bounds[15], levels[16];
    __shared__ int cuts[16][31];
    for (int i = threadIdx.x; i < 15; i += blockDim.x) bounds[i] = bounds_[i];
    for (int i = threadIdx.x; i < 16; i += blockDim.x) levels[i] = levels_[i];
    if (!weighted) for (int i = threadIdx.x; i < candidates * 31; i += blockDim.x) cuts[i / 31][i % 31] = cuts_[i];
    __syncthreads();
    const int lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
    const float least = limits[0], most = limits[1], least_gain = limits[2], grid = limits[3];
    for (int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32; block < blocks; block += warps) {
        const float absmax = scales[block];
        if (!(absmax > least && absmax < most)) continue;
        const float inverse = __fdiv_rn(1.0f, absmax);
        float x[2], y[2], w[2] = {1.0f, 1.0f};
        for (int k = 0; k < 2; k++) {
            const long long at = (long long)block * 64 + lane + 32 * k;
            x[k] = at < count ? widened(values, at, kind) : 0.0f;
            y[k] = __fmul_rn(x[k], inverse);
            if (weighted) w[k] = tiled[first[block] + lane + 32 * k];
        }
        float best = -1.0f, sigma = 1.0f;
        auto compare = [&](float a, float b) {
            const float gain = __fdiv_rn(__fmul_rn(a, a), b);
            if (gain > best) { best = gain; sigma = __fdiv_rn(a, b); }
        };
        auto sums = [&](float by, float& a, float& b) {
            float wqy[2], wqq[2];
            for (int k = 0; k < 2; k++) {
                const float q = levels[position(__fmul_rn(y[k], by), bounds)];
                const float wq = weighted ? __fmul_rn(w[k], q) : q;
                wqy[k] = __fmul_rn(wq, y[k]);
                wqq[k] = __fmul_rn(wq, q);
            }
            a = total(wqy[0], wqy[1]);
            b = total(wqq[0], wqq[1]);
        };
        auto error = [&](const int* at, float scale) {
            float squared[2];
            for (int k = 0; k < 2; k++) {
                const float loaded = rounded(__fmul_rn(levels[at[k]], scale), kind);
                const float difference = __fmul_rn(__fsub_rn(loaded, x[k]), inverse);
                squared[k] = __fmul_rn(difference, difference);
                if (weighted) squared[k] = __fmul_rn(w[k], squared[k]);
            }
            return total(squared[0], squared[1]);
        };
        float a, b;
        if (weighted) {
            for (int i = 0; i < candidates; i++) {
                sums(inverses[i], a, b);
                compare(a, b);
            }
        } else {
            const int whole[2] = {(int)rintf(__fmul_rn(y[0], grid)), (int)rintf(__fmul_rn(y[1], grid))};
            for (int i = 0; i < candidates; i++) {
                const int one = cuts[i][15 + position(whole[0], cuts[i])];
                const int other = cuts[i][15 + position(whole[1], cuts[i])];
                const int wq = total(whole[0] * one, whole[1] * other);
                compare(__int2float_rn(wq), __int2float_rn(total(one * one, other * other)));
            }
        }
        sums(__fdiv_rn(1.0f, sigma), a, b);
        const float found = __fmul_rn(absmax, __fdiv_rn(a, b)), by = __fdiv_rn(1.0f, found);
        const int before[2] = {position(y[0], bounds), position(y[1], bounds)};
        const int after[2] = {position(__fmul_rn(x[0], by), bounds), position(__fmul_rn(x[1], by), bounds)};
        if (!(error(after, found) < __fmul_rn(error(before, absmax), least_gain))) continue;
        for (int k = 0; k < 2; k++) {
            const int code = order[after[k]], next = __shfl_down_sync(~0u, code, 1);
            const long long at = (long long)block * 64 + lane + 32 * k;
            if (lane % 2 == 0 && at < count) packed[at / 2] = (unsigned char)(code << 4 | next);
        }
        if (lane == 0) scales[block] = found;
    }
}
"""
)

GPTQ: Final = (
    _SHARED
    + r"""
// A warp takes a row: lane i has its columns i, i + 32, i + 64 and i + 96 of the ``width`` that begin at ``start``.
extern "C" __global__ void gptq(
    const float* weight, const float* factor, const long long* order, const float* bounds_, const float* levels_,
    const unsigned char* codes, const float* scales, const float* inverses, int kind, int rows, int columns, int start,
    int width, unsigned char* found, float* errors
) {
    __shared__ float bounds[15], levels[16];
    for (int i = threadIdx.x; i < 15; i += blockDim.x) bounds[i] = bounds_[i];
    for (int i = threadIdx.x; i < 16; i += blockDim.x) levels[i] = levels_[i];
    __syncthreads();
    const int lane = threadIdx.x % 32, row = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const long long at = (long long)row * columns;
    float part[4], mine[4], scale[4], inverse[4];
    int column[4];
    for (int k = 0; k < 4; k++) {
        const int i = lane + 32 * k;
        if (i >= width) continue;
        column[k] = (int)order[start + i];
        part[k] = weight[at + start + i];
        scale[k] = scales[(at + column[k]) / 64];
        inverse[k] = inverses[(at + column[k]) / 64];
    }
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        for (int i = 32 * k; i < min(32 * k + 32, width); i++) {
            const float* line = factor + (long long)(start + i) * columns + start;
            const float value = __shfl_sync(~0u, part[k], i % 32), step = __shfl_sync(~0u, scale[k], i % 32);
            const int p = position(__fmul_rn(value, __shfl_sync(~0u, inverse[k], i % 32)), bounds);
            const float loaded = rounded(__fmul_rn(levels[p], step), kind);
            const float error = __fdiv_rn(__fsub_rn(value, loaded), line[i]);
            if (lane == i % 32) {
                mine[k] = error;
                found[at + column[k]] = codes[p];
            }
            #pragma unroll
            for (int l = k; l < 4; l++) {
                const int j = lane + 32 * l;
                if (j > i && j < width) part[l] = __fsub_rn(part[l], __fmul_rn(error, line[j]));
            }
        }
    }
    for (int k = 0; k < 4; k++)
        if (lane + 32 * k < width) errors[(long long)row * width + lane + 32 * k] = mine[k];
}
"""
)
