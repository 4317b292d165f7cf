// Gradients of C and D in kron_linear on CUDA. Spec: lorakern/ops/kron_linear/reference.py
//
// A row of x is X [B, Q], a row of dy is Y [A, P]. With H = X D^T and T = C^T Y, both made on chip
// and never stored, dC = sum over rows of Y H^T and dD of T^T X: one pass over x and dy. The spec
// writes and reads H and T and, in 16-bit, a float32 copy of x and dy.
//
// The sum over rows is linear in every entry of C and D. So a block takes one tile of C and one of
// D, kSide x kSide or smaller, walks a share of the rows with both gradients in registers, and ends
// with a partial result of each: any C and D go by tiling.

#pragma once

#include "pack.h"

namespace lorakern {

constexpr int kKronSide = 32, kKronLinearThreads = 64;
constexpr int kKronPitch = kKronSide + 4;
// in values of acc_t: X, Y, H, T, D and C
constexpr int kKronLinearShared = 6 * kKronSide * kKronPitch;

struct KronSizes {
  int64_t M, A, B, P, Q;
  // rows a block walks
  int64_t share;
};

// into_s[n, j] = read(n / kGroup, n % kGroup, j)
template <int kGroup, typename acc_t, typename Read>
__device__ __forceinline__ void stage(acc_t* into_s, Read read) {
#pragma unroll 4
  for (int n = threadIdx.x / kKronSide; n < kKronSide; n += kKronLinearThreads / kKronSide) {
    const int j = threadIdx.x % kKronSide;
    into_s[n * kKronPitch + j] = read(n / kGroup, n % kGroup, j);
  }
}

// sums[i][j] += a[y + 8 i, :] . b[x + 8 j, :] over kKronSide values
template <int kRows, int kCols, typename acc_t>
__device__ __forceinline__ void add_rows_by_rows(acc_t (&sums)[kRows][kCols], const acc_t* a,
                                                 const acc_t* b, int y, int x) {
#pragma unroll 2
  for (int k = 0; k < kKronSide; k += 4) {
    Pack<acc_t, 4> of_b[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) of_b[j] = load_pack<4>(b + (x + 8 * j) * kKronPitch + k);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto of_a = load_pack<4>(a + (y + 8 * i) * kKronPitch + k);
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) sums[i][j] += of_a.at[n] * of_b[j].at[n];
    }
  }
}

// sums[i][j] += a[:, y + i] . b[:, x + j] over `count` rows
template <typename acc_t>
__device__ __forceinline__ void add_columns_by_columns(acc_t (&sums)[4][4], const acc_t* a,
                                                       const acc_t* b, int count, int y, int x) {
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    const auto of_a = load_pack<4>(a + k * kKronPitch + y);
    const auto of_b = load_pack<4>(b + k * kKronPitch + x);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += of_a.at[i] * of_b.at[j];
  }
}

// A short sum to a long one: the long one then takes few roundings
template <int kRows, int kCols, typename acc_t>
__device__ __forceinline__ void add(acc_t (&to)[kRows][kCols], const acc_t (&from)[kRows][kCols]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kCols; ++j) to[i][j] += from[i][j];
}

// dc_parts[part, A, B], dd_parts[part, P, Q]; dy [M, A P], x [M, B Q], gain [A P] or null for 1.
//
// kC: side of a tile of C; kKronSide / kC rows are taken at once. dc_parts has one part for each
// tile of D and share of rows, dd_parts one for each tile of C and share. Null where not wanted.
template <typename scalar_t, typename acc_t, int kC>
__global__ void __launch_bounds__(kKronLinearThreads, sizeof(acc_t) == 8 ? 4 : 6)
    kron_linear_factors_kernel(acc_t* __restrict__ dc_parts, acc_t* __restrict__ dd_parts,
                               const scalar_t* __restrict__ dy, const scalar_t* __restrict__ x,
                               const acc_t* __restrict__ c, const acc_t* __restrict__ d,
                               const acc_t* __restrict__ gain, acc_t scale, KronSizes sizes) {
  constexpr int kAtOnce = kKronSide / kC, kMicro = kC / 8, kTile = kKronSide * kKronPitch;
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  acc_t* const x_s = reinterpret_cast<acc_t*>(dynamic_shared);
  acc_t *const y_s = x_s + kTile, *const h_s = y_s + kTile, *const t_s = h_s + kTile,
               *const d_s = t_s + kTile, *const c_s = d_s + kTile;

  const auto [M, A, B, P, Q, share] = sizes;
  const int64_t tiles_A = (A + kC - 1) / kC, tiles_B = (B + kC - 1) / kC,
                tiles_P = (P + kKronSide - 1) / kKronSide,
                tiles_Q = (Q + kKronSide - 1) / kKronSide;
  int64_t block = blockIdx.x;
  const int64_t tile_q = block % tiles_Q, tile_p = (block /= tiles_Q) % tiles_P,
                tile_b = (block /= tiles_P) % tiles_B, tile_a = (block /= tiles_B) % tiles_A,
                part = block / tiles_A;
  const int64_t a0 = tile_a * kC, b0 = tile_b * kC, p0 = tile_p * kKronSide,
                q0 = tile_q * kKronSide;
  // the thread's place on a grid of 8 x 8
  const int ty = threadIdx.x / 8, tx = threadIdx.x % 8;

  stage<kKronSide>(d_s, [&](int, int p, int q) {
    return p0 + p < P && q0 + q < Q ? d[(p0 + p) * Q + q0 + q] : acc_t(0);
  });
  stage<kKronSide>(c_s, [&](int, int a, int b) {
    const bool in = a < kC && b < kC && a0 + a < A && b0 + b < B;
    return in ? c[(a0 + a) * B + b0 + b] : acc_t(0);
  });

  acc_t dc[kMicro][kMicro] = {}, dd[4][4] = {};
  const int64_t end = min(M, (part + 1) * share);
  for (int64_t row = part * share; row < end; row += kAtOnce) {
    stage<kC>(x_s, [&](int m, int b, int q) {
      const bool in = row + m < end && b0 + b < B && q0 + q < Q;
      return in ? static_cast<acc_t>(x[(row + m) * B * Q + (b0 + b) * Q + q0 + q]) : acc_t(0);
    });
    stage<kC>(y_s, [&](int m, int a, int p) {
      if (row + m >= end || a0 + a >= A || p0 + p >= P) return acc_t(0);
      const int64_t o = (a0 + a) * P + p0 + p;
      const acc_t value = scale * static_cast<acc_t>(dy[(row + m) * A * P + o]);
      return gain ? gain[o] * value : value;
    });
    __syncthreads();
    if (dc_parts) {
      acc_t h[4][4] = {};
      add_rows_by_rows(h, x_s, d_s, ty, tx);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) h_s[(ty + 8 * i) * kKronPitch + tx + 8 * j] = h[i][j];
    }
    if (dd_parts) {
      // four rows of T: they belong to one m, as kC is a multiple of 4
      acc_t t[4][4] = {};
      const int m = ty * 4 / kC, b = ty * 4 % kC;
      add_columns_by_columns(t, c_s, y_s + m * kC * kKronPitch, kC, b, tx * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) t_s[(ty * 4 + i) * kKronPitch + tx * 4 + j] = t[i][j];
    }
    __syncthreads();
    if (dc_parts) {
      acc_t step[kMicro][kMicro] = {};
      for (int m = 0; m < kAtOnce; ++m)
        add_rows_by_rows(step, y_s + m * kC * kKronPitch, h_s + m * kC * kKronPitch, ty, tx);
      add(dc, step);
    }
    if (dd_parts) {
      acc_t step[4][4] = {};
      add_columns_by_columns(step, t_s, x_s, kKronSide, ty * 4, tx * 4);
      add(dd, step);
    }
    __syncthreads();
  }

  if (dc_parts) {
    acc_t* const to = dc_parts + ((part * tiles_P + tile_p) * tiles_Q + tile_q) * A * B;
#pragma unroll
    for (int i = 0; i < kMicro; ++i)
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        const int64_t a = a0 + ty + 8 * i, b = b0 + tx + 8 * j;
        if (a < A && b < B) to[a * B + b] = dc[i][j];
      }
  }
  if (dd_parts) {
    acc_t* const to = dd_parts + ((part * tiles_A + tile_a) * tiles_B + tile_b) * P * Q;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t p = p0 + ty * 4 + i, q = q0 + tx * 4 + j;
        if (p < P && q < Q) to[p * Q + q] = dd[i][j];
      }
  }
}

}  // namespace lorakern
