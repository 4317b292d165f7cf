// What the kernels of decoupled_attention share: groups of keys, tiles of rows, two products.
//
// A warp has 16 rows of queries, or of keys; the d channels of a head are padded to whole steps of
// 16 with zeros.

#pragma once

#include "mma.h"

namespace lorakern {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;
// rows of a block, in warps of 16
constexpr int kQueries = 16 * kAttentionWarps;
// a call's groups travel as one argument
constexpr int kMostGroups = 64;

template <int kD>
constexpr int kSteps = (kD + 15) / 16;
// blocks that a multiprocessor's registers hold
template <int kD>
constexpr int kResident = kD <= 48   ? 4
                          : kD <= 80 ? 3
                                     : 2;
// keys of a group that are in shared memory at once: with a block's queries at most 99 KB, which
// every GPU from sm_80 on has
template <int kD>
constexpr int kMostKeys = kD <= 80 ? 128 : 112;
// rows of a matrix, which neighbouring lanes read, meet no bank twice
template <int kD>
constexpr int kPitch = 16 * kSteps<kD> + 8;

template <typename scalar_t>
struct AttentionGroup {
  // keys and values [B, T, C]; mask or null for ones
  const scalar_t *k, *v, *mask;
  // [2, B H, Q]: base-2 logarithms of the softmax's sums, and rowsums of p dp; or null
  float* stats;
  // between the masks of two images: 0 for one mask that serves all
  int64_t mask_step;
  int T;
  float scale;
};

template <typename scalar_t>
struct AttentionGroups {
  AttentionGroup<scalar_t> at[kMostGroups];
  int count;
};

struct AttentionSizes {
  int64_t Q, H;
  // keys in shared memory, in whole steps of 16
  int tile;
  // 1 / sqrt(d), and that times log2(e)
  float scale, factor;
};

// One head of one image, and its rows of queries in tensors [B, Q, C]
template <int kD>
struct Head {
  int64_t b, h, C;

  __device__ __forceinline__ Head(int64_t head, int64_t H) : b(head / H), h(head % H), C(H * kD) {}
  // of row `row` in a tensor of `rows` a image
  __device__ __forceinline__ int64_t at(int64_t rows, int64_t row) const {
    return (b * rows + row) * C + h * kD;
  }
};

// mask of a query; 0 where the query is past the end
template <typename scalar_t>
__device__ __forceinline__ float mask_of(const AttentionGroup<scalar_t>& group, int64_t b,
                                         int64_t row, int64_t end) {
  if (row >= end) return 0;
  return group.mask ? static_cast<float>(group.mask[b * group.mask_step + row]) : 1.0f;
}

// to_s[row, kPitch] = from[row, kD], C apart, for the steps of 16 rows that `count` begins; 0 past
// count and past kD
template <int kD, typename scalar_t>
__device__ __forceinline__ void stage(scalar_t* to_s, const scalar_t* __restrict__ from, int64_t C,
                                      int count) {
  constexpr int kPacks = 2 * kSteps<kD>;
  for (int n = threadIdx.x; n < (count + 15) / 16 * 16 * kPacks; n += kAttentionThreads) {
    const int row = n / kPacks, col = n % kPacks * 8;
    Pack<scalar_t, 8> values = {};
    if (row < count && col < kD) values = load_pack<8>(from + row * C + col);
    store_pack(to_s + row * kPitch<kD> + col, values);
  }
}

// 16 rows of a left operand in registers: those from `row` on; 0 from `end` on and past kD
template <typename scalar_t, int kD>
struct HeldRows {
  uint32_t words[kSteps<kD>][4];

  __device__ __forceinline__ HeldRows(const scalar_t* __restrict__ from, int64_t C, int64_t row,
                                      int64_t end) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < kSteps<kD>; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t r = row + g + i % 2 * 8;
        const int col = step * 16 + i / 2 * 8 + 2 * t;
        Pack<scalar_t, 2> both = {};
        if (r < end && col < kD) both = load_pack<2>(from + r * C + col);
        words[step][i] = word(both);
      }
  }
  __device__ __forceinline__ void get(uint32_t (&a)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[step][i];
  }
};

// 16 staged rows of a left operand
template <typename scalar_t, int kD>
struct StagedRows {
  const scalar_t* rows_s;

  __device__ __forceinline__ void get(uint32_t (&a)[4], int step) const {
    load_tile<false>(a, rows_s + 16 * step, kPitch<kD>);
  }
};

// Wider heads leave no registers for the queries
template <int kD>
constexpr bool kHolds = kD <= 48;

// A warp's 16 of the block's rows from `row` on, held; or else staged in rows_s, with no barrier
// yet
template <bool kHeld, int kD, typename scalar_t>
__device__ __forceinline__ auto rows_of_warp(scalar_t* rows_s, const scalar_t* __restrict__ from,
                                             int64_t C, int64_t row, int64_t end) {
  const int first = threadIdx.x / 32 * 16;
  if constexpr (kHeld) {
    return HeldRows<scalar_t, kD>(from, C, row + first, end);
  } else {
    stage<kD>(rows_s, from + row * C, C, static_cast<int>(min(end - row, int64_t{kQueries})));
    return StagedRows<scalar_t, kD>{rows_s + first * kPitch<kD>};
  }
}

// sums[16, 16] = rows[16, kD] rows_s[16, kD]^T
template <int kD, bool kBf16, typename Rows, typename scalar_t>
__device__ __forceinline__ void rows_by_rows(float (&sums)[2][4], const Rows& rows,
                                             const scalar_t* rows_s) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0;
#pragma unroll
  for (int step = 0; step < kSteps<kD>; ++step) {
    uint32_t a[4], b[4];
    rows.get(a, step);
    load_rows(b, rows_s + 16 * step, kPitch<kD>);
    multiply_add<kBf16>(sums[0], a, b[0], b[1]);
    multiply_add<kBf16>(sums[1], a, b[2], b[3]);
  }
}

// sums[16, 8 kTiles] += a[16, 16] rows_s[16, 8 kTiles]
template <int kD, bool kBf16, int kTiles, typename scalar_t>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[kTiles][4], const float (&a)[2][4],
                                                  const scalar_t* rows_s) {
  uint32_t words[4];
  as_operand<scalar_t>(words, a);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    uint32_t b[4];
    load_tile<true>(b, rows_s + 8 * n, kPitch<kD>);
    multiply_add<kBf16>(sums[n], words, b[0], b[1]);
    multiply_add<kBf16>(sums[n + 1], words, b[2], b[3]);
  }
}

// over the four lanes that share a row
__device__ __forceinline__ float largest_of_row(float value) {
  value = max(value, __shfl_xor_sync(0xFFFFFFFF, value, 1));
  return max(value, __shfl_xor_sync(0xFFFFFFFF, value, 2));
}

__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(0xFFFFFFFF, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFF, value, 2);
}

// put(row, col, value 0 and 1) of a lane's sums[16, 8 kTiles], for columns below kD
template <int kD, int kTiles, typename Put>
__device__ __forceinline__ void each_pair(const float (&sums)[kTiles][4], const Put& put) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (n * 8 < kD) put(g + 8 * r, n * 8 + 2 * t, sums[n][2 * r], sums[n][2 * r + 1]);
}

}  // namespace lorakern
