// lora_linear_shared on CUDA, forward, where x has few rows: the keys and values that the 32 to 140
// layers of a UNet make of one text. Spec: lorakern/ops/lora_linear_shared/reference.py
//
// Floor: one read of every W, 38 MB in SD 1.5 and 681 MB in SDXL (0.01 and 0.2 ms of an H100's
// memory); x and the factors stay in L2. One by one each layer is 2 to 4 launches, each some 3 us
// and of few blocks. Here all layers are two launches, one more pair for each kSharedLayers: first
// h in slices over I, then y, where a block has all rows of a tile and 128 columns of a layer, so
// that W is read once for 80 rows.

#pragma once

#include "copy_async.h"
#include "lora_linear_shared_tile.h"

namespace lorakern {

// columns of x in a slice of h
constexpr int kSlice = 256, kSlicePitch = kSlice + 8;
// values of 16 bits in shared memory
constexpr int kSliceShared = (kTextRows + kRanks) * kSlicePitch;

// columns of y in a tile, by warps of 32; columns of x that are on chip at once, and how often
constexpr int kTileCols = 128, kTileThreads = kTileCols;
constexpr int kDepth = 64, kDepthPitch = kDepth + 8, kStages = 2;
constexpr int kStage = (kTextRows + kTileCols) * kDepthPitch, kTileShared = kStages * kStage;

template <typename scalar_t, typename factor_t>
struct ForwardLayer {
  // bias [O] or null
  const scalar_t *weight, *bias;
  const factor_t *down, *up;
  scalar_t* y;
  float scale;
  // first: of its columns of h
  int O, R, first, tile;
};

// parts[slice, M, S] = x down^T over a slice of columns; a block is a tile of rows and of ranks
template <typename scalar_t, typename factor_t, bool kBf16>
__global__ void __launch_bounds__(kTextThreads)
    lora_linear_shared_h_kernel(
        float* __restrict__ parts, const scalar_t* __restrict__ x,
        const __grid_constant__ LayersOf<ForwardLayer<scalar_t, factor_t>> layers,
        SharedSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const x_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t* const down_s = x_s + kTextRows * kSlicePitch;
  const auto [M, I, S] = sizes;
  const int64_t tiles_M = tiles_of(M, kTextRows), slices = tiles_of(I, kSlice);
  const int64_t row = blockIdx.x % tiles_M * kTextRows, slice = blockIdx.x / tiles_M % slices,
                tile = blockIdx.x / tiles_M / slices, from = slice * kSlice;
  const auto& layer = layers.of(tile);
  const int64_t rank = (tile - layer.tile) * kRanks, cols = min(I - from, int64_t{kSlice});

  constexpr int kPacks = kSlice / 8;
  for (int n = threadIdx.x; n < kTextRows * kPacks; n += kTextThreads) {
    const int r = n / kPacks, col = n % kPacks * 8;
    const bool in = row + r < M && col < cols;
    copy_async(x_s + r * kSlicePitch + col, in ? x + (row + r) * I + from + col : x, in);
  }
  end_copies();
  stage_each<kRanks, kSlice, kSlicePitch>(down_s, layer.R - rank, cols, [&](int r, int col) {
    return layer.down[(rank + r) * I + from + col];
  });
  wait_copies<0>();
  __syncthreads();

  const int first = threadIdx.x / 32 * 16;
  float sums[2][4] = {};
  for (int k = 0; k < cols; k += 16) {
    uint32_t a[4], b[4];
    load_tile<false>(a, x_s + first * kSlicePitch + k, kSlicePitch);
    load_rows(b, down_s + k, kSlicePitch);
    multiply_add<kBf16>(sums[0], a, b[0], b[1]);
    multiply_add<kBf16>(sums[1], a, b[2], b[3]);
  }
  each_sum(sums, [&](int r, int col, float sum) {
    const int64_t m = row + first + r;
    if (m < M && rank + col < layer.R)
      parts[(slice * M + m) * S + layer.first + rank + col] = sum;
  });
}

// sums[80, 32] += a_s[80, 16] b_s[32, 16]^T
template <bool kBf16, typename scalar_t>
__device__ __forceinline__ void add_step(float (&sums)[kTextWarps][4][4], const scalar_t* a_s,
                                         const scalar_t* b_s, int pitch) {
  uint32_t b[2][4];
#pragma unroll
  for (int n = 0; n < 2; ++n) load_rows(b[n], b_s + n * 16 * pitch, pitch);
#pragma unroll
  for (int m = 0; m < kTextWarps; ++m) {
    uint32_t a[4];
    load_tile<false>(a, a_s + m * 16 * pitch, pitch);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      multiply_add<kBf16>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

// y = x W^T + b + scale h up^T of every layer, and h[M, S], the sum of parts
//
// h is rounded as it is kept for backward, relative to the update and not to y; the update is
// scaled in the float32 sums that the base product then joins.
template <typename scalar_t, typename factor_t, bool kBf16>
__global__ void __launch_bounds__(kTileThreads, 3)
    lora_linear_shared_y_kernel(
        scalar_t* __restrict__ h, const float* __restrict__ parts, const scalar_t* __restrict__ x,
        const __grid_constant__ LayersOf<ForwardLayer<scalar_t, factor_t>> layers,
        SharedSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const stages = reinterpret_cast<scalar_t*>(dynamic_shared);
  const auto [M, I, S] = sizes;
  const int64_t tiles_M = tiles_of(M, kTextRows), slices = tiles_of(I, kSlice);
  // blocks that read the same weights run side by side
  const int64_t row = blockIdx.x % tiles_M * kTextRows, tile = blockIdx.x / tiles_M;
  const auto& layer = layers.of(tile);
  const int64_t col = (tile - layer.tile) * kTileCols;
  const int rows = static_cast<int>(min(M - row, int64_t{kTextRows})),
            cols = static_cast<int>(min(layer.O - col, int64_t{kTileCols})),
            of_warp = threadIdx.x / 32 * 32;

  // a step's columns of x and W; each thread has one pack of every 16th row
  const auto fetch = [&](int64_t step) {
    constexpr int kPacks = kDepth / 8, kAtOnce = kTileThreads / kPacks;
    const int first = threadIdx.x / kPacks, at = threadIdx.x % kPacks * 8;
    const int64_t k = step * kDepth + at;
    scalar_t* const to_s = stages + step % kStages * kStage + first * kDepthPitch + at;
    const scalar_t *const of_x = x + (row + first) * I + k,
                   *const of_w = layer.weight + (col + first) * I + k;
#pragma unroll
    for (int n = 0; n < kTextRows; n += kAtOnce) {
      const bool in = first + n < rows && k < I;
      copy_async(to_s + n * kDepthPitch, in ? of_x + n * I : x, in);
    }
#pragma unroll
    for (int n = 0; n < kTileCols; n += kAtOnce) {
      const bool in = first + n < cols && k < I;
      copy_async(to_s + (kTextRows + n) * kDepthPitch, in ? of_w + n * I : x, in);
    }
    end_copies();
  };

  const int64_t steps = tiles_of(I, kDepth);
  for (int step = 0; step < kStages - 1; ++step) fetch(step);

  float sums[kTextWarps][4][4] = {};
  // in the last stage, which is not fetched yet
  scalar_t *const h_s = stages + (kStages - 1) * kStage, *const up_s = h_s + kTextRows * kRankPitch;
  for (int rank = 0; rank < layer.R; rank += kRanks) {
    __syncthreads();
    stage_each<kTextRows, kRanks, kRankPitch>(h_s, rows, layer.R - rank, [&](int r, int n) {
      const int64_t at = (row + r) * S + layer.first + rank + n;
      float sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += parts[slice * M * S + at];
      if (col == 0) h[at] = static_cast<scalar_t>(sum);
      return sum;
    });
    stage_each<kTileCols, kRanks, kRankPitch>(up_s, cols, layer.R - rank, [&](int o, int n) {
      return layer.up[(col + o) * layer.R + rank + n];
    });
    __syncthreads();
    add_step<kBf16>(sums, h_s, up_s + of_warp * kRankPitch, kRankPitch);
  }
#pragma unroll
  for (int n = 0; n < kTextWarps * 16; ++n) sums[n / 16][n / 4 % 4][n % 4] *= layer.scale;

  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    // and every warp is done with the stage that is fetched next
    __syncthreads();
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    else end_copies();
    const scalar_t *const x_s = stages + step % kStages * kStage,
                   *const w_s = x_s + (kTextRows + of_warp) * kDepthPitch;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) add_step<kBf16>(sums, x_s + k, w_s + k, kDepthPitch);
  }

  const bool pairs = layer.O % 2 == 0 && reinterpret_cast<uintptr_t>(layer.y) % 4 == 0;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int at = of_warp + n * 8 + 2 * t;
    if (at >= cols) continue;
    const bool both = at + 1 < cols;
    const float bias[2] = {layer.bias ? static_cast<float>(layer.bias[col + at]) : 0.f,
                           layer.bias && both ? static_cast<float>(layer.bias[col + at + 1]) : 0.f};
#pragma unroll
    for (int m = 0; m < 2 * kTextWarps; ++m) {
      const int r = m * 8 + g;
      if (r >= rows) continue;
      const float* const of = sums[m / 2][n] + m % 2 * 2;
      const auto value = rounded<scalar_t>(of[0] + bias[0], of[1] + bias[1]);
      scalar_t* const to = layer.y + (row + r) * layer.O + col + at;
      if (pairs) {
        store_pack(to, value);
      } else {
        to[0] = value.at[0];
        if (both) to[1] = value.at[1];
      }
    }
  }
}

}  // namespace lorakern
