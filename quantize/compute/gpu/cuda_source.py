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
__device__ float plus(float one, float other) { return __fadd_rn(one, other); }
__device__ int plus(int one, int other) { return one + other; }

template <typename T> __device__ T total(T* each, unsigned lanes) {  // by halves: 32, 16 and 8 apart, then 4, 2 and 1
    for (int half = 4; half; half /= 2)
        for (int k = 0; k < half; k++) each[k] = plus(each[k], each[k + half]);
    for (int half = 4; half; half /= 2) each[0] = plus(each[0], __shfl_xor_sync(lanes, each[0], half));
    return each[0];
}

// In which of 32 parts of [-1, 1] a scaled value is, or one on the grid; beyond, in the first or last.
__device__ int cell(float value) {
    const float part = fminf(fmaxf(__fmaf_rn(value, 16.0f, 15.5f), 0.0f), 31.0f);
    return __float_as_int(__fadd_rn(part, 8388608.0f)) & 31;
}
__device__ int cell(int value) { return min((value >> 8) + 16, 31); }  // 4096 steps from 0 to 1

// The level nearest to a value, without a search: of the bounds in one part, the levels differ only around the last.
template <typename T> struct Nearest {
    T bound[32], below[32], above[32];
    __device__ void fill(int part, const T* bounds, const T* levels, T none) {
        int before = 0, here = 0;
        for (int i = 0; i < 15; i++) {
            before += cell(bounds[i]) < part;
            here += cell(bounds[i]) == part;
        }
        bound[part] = here ? bounds[before + here - 1] : none;
        below[part] = levels[before + max(here - 1, 0)];
        above[part] = levels[before + here];
    }
    __device__ T level(T value) const {
        const int part = cell(value);
        return value > bound[part] ? above[part] : below[part];
    }
};

// Eight lanes take a block of 64 values: lane i has those at i, i + 8, … i + 56, so half of a sum needs no exchange.
extern "C" __global__ void search(
    const void* values, int count, int kind, const float* known, const int* on_grid, int candidates, const float* tiled,
    int column, int columns, unsigned char* packed, float* scales, int blocks, float* seen
) {
    const float *bounds_ = known, *levels_ = known + 15, *inverses = known + 35;
    const float least = known[31], most = known[32], least_gain = known[33], grid = known[34];
    const bool weighted = columns > 0;
    __shared__ float bounds[15], levels[16];
    __shared__ int order[16];
    __shared__ Nearest<float> nearest;
    __shared__ Nearest<int> coarse[16];
    for (int i = threadIdx.x; i < 16; i += blockDim.x) {
        if (i < 15) bounds[i] = bounds_[i];
        levels[i] = levels_[i];
        order[i] = on_grid[i];
    }
    for (int i = threadIdx.x; i < 32; i += blockDim.x) nearest.fill(i, bounds_, levels_, 3e38f);
    for (int i = threadIdx.x; !weighted && i < candidates * 32; i += blockDim.x) {
        const int* cuts = on_grid + 16 + i / 32 * 31;
        coarse[i / 32].fill(i % 32, cuts, cuts + 15, 1 << 30);
    }
    __syncthreads();
    const int lane = threadIdx.x % 8, step = gridDim.x * (blockDim.x / 8);
    const unsigned lanes = 0xffu << (threadIdx.x % 32 - lane);
    for (int block = (blockIdx.x * blockDim.x + threadIdx.x) / 8; block < blocks; block += step) {
        const float absmax = scales[block];
        const long long start = (long long)block * 64 + lane;
        float x[8], y[8], w[8];
        for (int k = 0; k < 8; k++) {
            const long long at = start + 8 * k;
            x[k] = at < count ? widened(values, at, kind) : 0.0f;
            if (!(fabsf(x[k]) <= 3.402823466e38f)) *seen = __int_as_float(0x7f800000);
        }
        if (!(absmax > least && absmax < most)) continue;
        const float inverse = __fdiv_rn(1.0f, absmax);
        const unsigned first = weighted ? (column + block * 64u) % columns + lane : 0;
        for (int k = 0; k < 8; k++) {
            y[k] = __fmul_rn(x[k], inverse);
            w[k] = weighted ? tiled[first + 8 * k] : 1.0f;
        }
        float best = -1.0f, sigma = 1.0f;
        auto compare = [&](float a, float b) {
            const float gain = __fdiv_rn(__fmul_rn(a, a), b);
            if (gain > best) { best = gain; sigma = __fdiv_rn(a, b); }
        };
        auto sums = [&](float by, float& a, float& b) {
            float wqy[8], wqq[8];
            for (int k = 0; k < 8; k++) {
                const float q = nearest.level(__fmul_rn(y[k], by));
                const float wq = weighted ? __fmul_rn(w[k], q) : q;
                wqy[k] = __fmul_rn(wq, y[k]);
                wqq[k] = __fmul_rn(wq, q);
            }
            a = total(wqy, lanes);
            b = total(wqq, lanes);
        };
        auto error = [&](const int* at, float scale) {
            float squared[8];
            for (int k = 0; k < 8; k++) {
                const float loaded = rounded(__fmul_rn(levels[at[k]], scale), kind);
                const float difference = __fmul_rn(__fsub_rn(loaded, x[k]), inverse);
                squared[k] = __fmul_rn(difference, difference);
                if (weighted) squared[k] = __fmul_rn(w[k], squared[k]);
            }
            return total(squared, lanes);
        };
        float a, b;
        for (int i = 0; i < candidates; i++) {
            if (weighted) {
                sums(inverses[i], a, b);
            } else {
                int wq[8], qq[8];
                for (int k = 0; k < 8; k++) {
                    const int whole = (int)rintf(__fmul_rn(y[k], grid)), q = coarse[i].level(whole);
                    wq[k] = whole * q;
                    qq[k] = q * q;
                }
                a = __int2float_rn(total(wq, lanes));
                b = __int2float_rn(total(qq, lanes));
            }
            compare(a, b);
        }
        sums(__fdiv_rn(1.0f, sigma), a, b);
        const float found = __fmul_rn(absmax, __fdiv_rn(a, b)), by = __fdiv_rn(1.0f, found);
        int before[8], after[8];
        for (int k = 0; k < 8; k++) {
            before[k] = position(y[k], bounds);
            after[k] = position(__fmul_rn(x[k], by), bounds);
        }
        if (!(error(after, found) < __fmul_rn(error(before, absmax), least_gain))) continue;
        for (int k = 0; k < 8; k++) {
            const int code = order[after[k]], next = __shfl_down_sync(lanes, code, 1);
            const long long at = start + 8 * k;
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
