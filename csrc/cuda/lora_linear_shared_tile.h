// What the kernels of lora_linear_shared share: layers as an argument, and tiles of few rows.

#pragma once

#include "mma.h"

namespace lorakern {

// layers of a launch: some 3 of the 4 KiB that the arguments of a kernel may have
constexpr int kSharedLayers = 48;
// rows of a tile: 77 tokens of text, and the better part of 2, 4 or 8 times as many
constexpr int kTextRows = 80, kTextWarps = kTextRows / 16, kTextThreads = 32 * kTextWarps;
// columns of h in a tile; wider ranks are several
constexpr int kRanks = 16;
// in shared memory; rows of a matrix, which neighbouring lanes read, meet no bank twice
constexpr int kRankPitch = kRanks + 8;

template <typename Layer>
struct LayersOf {
  // each with `tile`, the tiles of those before it
  Layer at[kSharedLayers];
  int count;

  // with this tile
  __device__ __forceinline__ const Layer& of(int64_t tile) const {
    int low = 0;
    for (int high = count - 1; low < high;) {
      const int middle = (low + high + 1) / 2;
      if (at[middle].tile <= tile) low = middle;
      else high = middle - 1;
    }
    return at[low];
  }
};

// S: columns of h, the ranks of all layers
struct SharedSizes {
  int64_t M, I, S;
};

__host__ __device__ __forceinline__ int64_t tiles_of(int64_t size, int64_t by) {
  return (size + by - 1) / by;
}

// to_s[row, col] = read(row, col), below the given rows and columns; 0 past them
template <int kRows, int kCols, int kPitch, typename scalar_t, typename Read>
__device__ __forceinline__ void stage_each(scalar_t* to_s, int64_t rows, int64_t cols, Read read) {
#pragma unroll 4
  for (int n = threadIdx.x; n < kRows * kCols; n += blockDim.x) {
    const int row = n / kCols, col = n % kCols;
    const bool in = row < rows && col < cols;
    to_s[row * kPitch + col] = in ? static_cast<scalar_t>(read(row, col)) : scalar_t(0);
  }
}

// to_s[row, col] = from[row, col], rows `step` apart and in whole packs, as above
template <int kRows, int kCols, int kPitch, typename scalar_t>
__device__ __forceinline__ void stage_packs(scalar_t* to_s, const scalar_t* __restrict__ from,
                                            int64_t step, int64_t rows, int64_t cols) {
  constexpr int kPacks = kCols / 8;
#pragma unroll 4
  for (int n = threadIdx.x; n < kRows * kPacks; n += blockDim.x) {
    const int row = n / kPacks, col = n % kPacks * 8;
    Pack<scalar_t, 8> values = {};
    if (row < rows && col < cols) values = load_pack<8>(from + row * step + col);
    store_pack(to_s + row * kPitch + col, values);
  }
}

// put(row, column, sum) of a lane's 16 x 8 kTiles sums
template <int kTiles, typename Put>
__device__ __forceinline__ void each_sum(const float (&sums)[kTiles][4], const Put& put) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) put(g + i / 2 * 8, n * 8 + 2 * t + i % 2, sums[n][i]);
}

}  // namespace lorakern
