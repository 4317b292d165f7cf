// lora_linear_shared on CUDA, gradients of the factors. Spec:
// lorakern/ops/lora_linear_shared/reference.py
//
// Floor: one read of every dy, M x sum(O), and the gradients' write; one by one each layer is 3 to 6
// launches. Here all layers are two, and two more for each kSharedLayers: the first reads dy once for
// dup = s dy^T h and for parts of dy up, a part for each 160 columns; the second sums these to dh and
// makes ddown = s dh^T x. A block walks all rows, so each sum has one order.

#pragma once

#include "lora_linear_shared_tile.h"

namespace lorakern {

// columns of dy in a tile: two steps of 16 a warp
constexpr int kGradCols = 32 * kTextWarps, kGradPitch = kGradCols + 8;
// values of 16 bits in shared memory: dy, h and up
constexpr int kGradShared = kTextRows * kGradPitch + (kTextRows + kGradCols) * kRankPitch;

// columns of x in a tile, by warps of 64
constexpr int kDownCols = 256, kDownThreads = kDownCols / 2, kDownPitch = kDownCols + 8;
// x and dh
constexpr int kDownShared = kTextRows * (kDownPitch + kRankPitch);

template <typename scalar_t, typename factor_t>
struct BackwardLayer {
  const scalar_t* dy;
  const factor_t* up;
  // [tiles of O, M, R], dy up; null where ddown is not wanted
  float* parts;
  // null where not wanted
  factor_t *ddown, *dup;
  float scale;
  // first: of its columns of h
  int O, R, first, tile;
};

// parts and dup of each layer; a block is a tile of its columns and of its ranks
template <typename scalar_t, typename factor_t, bool kBf16>
__global__ void __launch_bounds__(kTextThreads)
    lora_linear_shared_dup_kernel(
        const scalar_t* __restrict__ h,
        const __grid_constant__ LayersOf<BackwardLayer<scalar_t, factor_t>> layers,
        SharedSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const dy_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t *const h_s = dy_s + kTextRows * kGradPitch, *const up_s = h_s + kTextRows * kRankPitch;
  const auto& layer = layers.of(blockIdx.x);
  const int64_t M = sizes.M, S = sizes.S, O = layer.O, R = layer.R, tiles_O = tiles_of(O, kGradCols),
                tile = (blockIdx.x - layer.tile) % tiles_O, col = tile * kGradCols,
                rank = (blockIdx.x - layer.tile) / tiles_O * kRanks;
  const int warp = threadIdx.x / 32;

  stage_each<kGradCols, kRanks, kRankPitch>(
      up_s, O - col, R - rank, [&](int o, int r) { return layer.up[(col + o) * R + rank + r]; });
  // rows of dup
  float dup[2][2][4] = {};
  for (int64_t row = 0; row < M; row += kTextRows) {
    __syncthreads();
    const scalar_t* const dy = layer.dy + row * O + col;
    if (O % 8 == 0) {
      stage_packs<kTextRows, kGradCols, kGradPitch>(dy_s, dy, O, M - row, O - col);
    } else {
      stage_each<kTextRows, kGradCols, kGradPitch>(dy_s, M - row, O - col,
                                                   [&](int m, int o) { return dy[m * O + o]; });
    }
    stage_each<kTextRows, kRanks, kRankPitch>(h_s, M - row, R - rank, [&](int m, int r) {
      return h[(row + m) * S + layer.first + rank + r];
    });
    __syncthreads();
    if (layer.parts) {
      float part[2][4] = {};
#pragma unroll 2
      for (int o = 0; o < kGradCols; o += 16) {
        uint32_t a[4], b[4];
        load_tile<false>(a, dy_s + warp * 16 * kGradPitch + o, kGradPitch);
        load_tile<true>(b, up_s + o * kRankPitch, kRankPitch);
        multiply_add<kBf16>(part[0], a, b[0], b[1]);
        multiply_add<kBf16>(part[1], a, b[2], b[3]);
      }
      each_sum(part, [&](int m, int r, float sum) {
        const int64_t at = row + warp * 16 + m;
        if (at < M && rank + r < R) layer.parts[(tile * M + at) * R + rank + r] = sum;
      });
    }
    if (layer.dup) {
#pragma unroll
      for (int m = 0; m < kTextRows; m += 16) {
        uint32_t b[4];
        load_tile<true>(b, h_s + m * kRankPitch, kRankPitch);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t a[4];
          load_columns(a, dy_s + m * kGradPitch + warp * 32 + n * 16, kGradPitch);
          multiply_add<kBf16>(dup[n][0], a, b[0], b[1]);
          multiply_add<kBf16>(dup[n][1], a, b[2], b[3]);
        }
      }
    }
  }
  if (!layer.dup) return;
#pragma unroll
  for (int n = 0; n < 2; ++n)
    each_sum(dup[n], [&](int o, int r, float sum) {
      const int64_t at = col + warp * 32 + n * 16 + o;
      if (at < O && rank + r < R)
        layer.dup[at * R + rank + r] = static_cast<factor_t>(layer.scale * sum);
    });
}

// ddown of each layer, of its parts; a block is a tile of its ranks and of x's columns
template <typename scalar_t, typename factor_t, bool kBf16>
__global__ void __launch_bounds__(kDownThreads)
    lora_linear_shared_ddown_kernel(
        const scalar_t* __restrict__ x,
        const __grid_constant__ LayersOf<BackwardLayer<scalar_t, factor_t>> layers,
        SharedSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const x_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t* const dh_s = x_s + kTextRows * kDownPitch;
  const auto& layer = layers.of(blockIdx.x);
  const int64_t M = sizes.M, I = sizes.I, R = layer.R, tiles_I = tiles_of(I, kDownCols),
                tiles_O = tiles_of(layer.O, kGradCols),
                col = (blockIdx.x - layer.tile) % tiles_I * kDownCols,
                rank = (blockIdx.x - layer.tile) / tiles_I * kRanks;
  const int of_warp = threadIdx.x / 32 * 64;

  float ddown[8][4] = {};
  for (int64_t row = 0; row < M; row += kTextRows) {
    __syncthreads();
    stage_packs<kTextRows, kDownCols, kDownPitch>(x_s, x + row * I + col, I, M - row, I - col);
    // rounded relative to itself; scaled in float32, at the end
    stage_each<kTextRows, kRanks, kRankPitch>(dh_s, M - row, R - rank, [&](int m, int r) {
      float sum = 0;
      for (int64_t tile = 0; tile < tiles_O; ++tile)
        sum += layer.parts[(tile * M + row + m) * R + rank + r];
      return sum;
    });
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTextRows; m += 16) {
      uint32_t a[4];
      load_columns(a, dh_s + m * kRankPitch, kRankPitch);
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_tile<true>(b, x_s + m * kDownPitch + of_warp + n * 8, kDownPitch);
        multiply_add<kBf16>(ddown[n], a, b[0], b[1]);
        multiply_add<kBf16>(ddown[n + 1], a, b[2], b[3]);
      }
    }
  }
  each_sum(ddown, [&](int r, int i, float sum) {
    const int64_t at = col + of_warp + i;
    if (rank + r < R && at < I)
      layer.ddown[(rank + r) * I + at] = static_cast<factor_t>(layer.scale * sum);
  });
}

}  // namespace lorakern
