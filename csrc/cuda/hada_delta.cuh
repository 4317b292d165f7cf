// hada_delta on CUDA. Spec: lorakern/ops/hada_delta/reference.py
//
// The spec writes and reads two O x I products, and three more on the way back. Here a block makes
// a kHadaTile x kHadaTile tile of a product from slices of the factors in shared memory, so that no
// product reaches memory. All matrices are row-major; acc_t is the type of the sums.

#pragma once

#include "pack.h"

namespace lorakern {

constexpr int kHadaTile = 64, kHadaDepth = 16, kHadaThreads = 256;
// a row of a staged tile, padded so that threads on neighbouring rows meet no bank twice
constexpr int kHadaPitch = kHadaTile + 4;
constexpr int kHadaSlice = kHadaDepth * kHadaPitch;
// in values of acc_t: two slices; backward a tile beside them
constexpr int kHadaShared = 2 * kHadaSlice;
constexpr int kHadaBackwardShared = kHadaShared + kHadaTile * kHadaPitch;

// up_s[r, o] = up[row + o, rank + r] and down_s[r, i] = down[rank + r, col + i]; 0 past an edge
template <typename scalar_t, typename acc_t>
__device__ void stage_slices(acc_t* up_s, acc_t* down_s, const scalar_t* __restrict__ up,
                             const scalar_t* __restrict__ down, int64_t row, int64_t col, int rank,
                             int64_t O, int64_t I, int R) {
  for (int n = threadIdx.x; n < kHadaDepth * kHadaTile; n += kHadaThreads) {
    // neighbouring threads take neighbouring addresses: up along r, down along i
    const int r_up = n % kHadaDepth, o = n / kHadaDepth, i = n % kHadaTile, r = n / kHadaTile;
    const bool in_up = row + o < O && rank + r_up < R, in_down = col + i < I && rank + r < R;
    up_s[r_up * kHadaPitch + o] =
        in_up ? static_cast<acc_t>(up[(row + o) * R + rank + r_up]) : acc_t(0);
    down_s[r * kHadaPitch + i] =
        in_down ? static_cast<acc_t>(down[(rank + r) * I + col + i]) : acc_t(0);
  }
}

// The thread's 4 x 4 of up down; ends with the slices free for the next use
template <typename scalar_t, typename acc_t>
__device__ void tile_product(acc_t (&sums)[4][4], acc_t* up_s, acc_t* down_s,
                             const scalar_t* __restrict__ up, const scalar_t* __restrict__ down,
                             int64_t row, int64_t col, int64_t O, int64_t I, int R) {
  const int o = threadIdx.x / 16 * 4, i = threadIdx.x % 16 * 4;
  for (auto& line : sums)
    for (auto& sum : line) sum = 0;
  for (int rank = 0; rank < R; rank += kHadaDepth) {
    stage_slices(up_s, down_s, up, down, row, col, rank, O, I, R);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kHadaDepth; ++r) {
      const auto u = load_pack<4>(up_s + r * kHadaPitch + o);
      const auto d = load_pack<4>(down_s + r * kHadaPitch + i);
#pragma unroll
      for (int a = 0; a < 4; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) sums[a][b] += u.at[a] * d.at[b];
    }
    __syncthreads();
  }
}

// dw[O, I] = scale * (up1 down1) * (up2 down2); a block is a tile
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kHadaThreads)
    hada_delta_fwd_kernel(scalar_t* __restrict__ dw, const scalar_t* __restrict__ down1,
                          const scalar_t* __restrict__ up1, const scalar_t* __restrict__ down2,
                          const scalar_t* __restrict__ up2, acc_t scale, int64_t O, int64_t I,
                          int R1, int R2) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  acc_t* const up_s = reinterpret_cast<acc_t*>(dynamic_shared);
  acc_t* const down_s = up_s + kHadaSlice;
  const int64_t tiles_I = (I + kHadaTile - 1) / kHadaTile;
  const int64_t row = blockIdx.x / tiles_I * kHadaTile, col = blockIdx.x % tiles_I * kHadaTile;

  acc_t first[4][4], second[4][4];
  tile_product(first, up_s, down_s, up1, down1, row, col, O, I, R1);
  tile_product(second, up_s, down_s, up2, down2, row, col, O, I, R2);

  const int64_t o = row + threadIdx.x / 16 * 4, i = col + threadIdx.x % 16 * 4;
  if (i >= I) return;
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    if (o + a >= O) return;
    Pack<scalar_t, 4> out;
#pragma unroll
    for (int b = 0; b < 4; ++b)
      out.at[b] = static_cast<scalar_t>(scale * first[a][b] * second[a][b]);
    scalar_t* const to = dw + (o + a) * I + i;
    if (I % 4 == 0) {
      store_pack(to, out);
    } else {
      for (int b = 0; b < 4 && i + b < I; ++b) to[b] = out.at[b];
    }
  }
}

template <typename acc_t>
__device__ __forceinline__ void set_or_add(acc_t* to, acc_t value, bool first) {
  *to = first ? value : *to + value;
}

// Gradients of one pair of factors from f = scale * ddelta * (other_up other_down):
//
// down_parts[part, R, I] = up^T f over the rows of a block, up_parts[part, O, R] = f down^T over
// its columns. A block makes span x span tiles one after the other and adds to parts that are its
// own: down_parts has one part a block of rows, up_parts one a block of columns. Null where not
// wanted.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kHadaThreads)
    hada_delta_bwd_kernel(acc_t* __restrict__ down_parts, acc_t* __restrict__ up_parts,
                          const scalar_t* __restrict__ ddelta, const scalar_t* __restrict__ down,
                          const scalar_t* __restrict__ up, const scalar_t* __restrict__ other_down,
                          const scalar_t* __restrict__ other_up, acc_t scale, int64_t O, int64_t I,
                          int R, int other_R, int span) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  acc_t* const up_s = reinterpret_cast<acc_t*>(dynamic_shared);
  acc_t* const down_s = up_s + kHadaSlice;
  acc_t* const f_s = down_s + kHadaSlice;
  const int64_t side = static_cast<int64_t>(span) * kHadaTile, blocks_I = (I + side - 1) / side;
  const int64_t part_O = blockIdx.x / blocks_I, part_I = blockIdx.x % blocks_I;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  if (down_parts) down_parts += part_O * R * I;
  if (up_parts) up_parts += part_I * O * R;

  for (int tile = 0; tile < span * span; ++tile) {
    const int64_t row = part_O * side + tile / span * kHadaTile;
    const int64_t col = part_I * side + tile % span * kHadaTile;
    if (row >= O || col >= I) continue;
    acc_t sums[4][4];
    tile_product(sums, up_s, down_s, other_up, other_down, row, col, O, I, other_R);
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int64_t o = row + y * 4 + a, i = col + x * 4 + b;
        const acc_t dw = o < O && i < I ? static_cast<acc_t>(ddelta[o * I + i]) : acc_t(0);
        f_s[(y * 4 + a) * kHadaPitch + x * 4 + b] = scale * dw * sums[a][b];
      }
    for (int rank = 0; rank < R; rank += kHadaDepth) {
      stage_slices(up_s, down_s, up, down, row, col, rank, O, I, R);
      __syncthreads();
      // rank y and columns 4 x + b of down; rank x and rows y + 16 a of up
      acc_t ddown[4] = {}, dup[4] = {};
#pragma unroll 4
      for (int k = 0; k < kHadaTile; k += 4) {
        const auto u = load_pack<4>(up_s + y * kHadaPitch + k);
        const auto d = load_pack<4>(down_s + x * kHadaPitch + k);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const auto over_rows = load_pack<4>(f_s + (k + n) * kHadaPitch + x * 4);
          const auto over_cols = load_pack<4>(f_s + (y + 16 * n) * kHadaPitch + k);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            ddown[b] += u.at[n] * over_rows.at[b];
            dup[n] += over_cols.at[b] * d.at[b];
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int64_t i = col + x * 4 + n, o = row + y + 16 * n;
        if (down_parts && rank + y < R && i < I)
          set_or_add(down_parts + (rank + y) * I + i, ddown[n], tile / span == 0);
        if (up_parts && rank + x < R && o < O)
          set_or_add(up_parts + o * R + rank + x, dup[n], tile % span == 0);
      }
      __syncthreads();
    }
  }
}

}  // namespace lorakern
