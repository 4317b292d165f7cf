// decoupled_attention on CUDA, forward. Spec: lorakern/ops/decoupled_attention/reference.py
//
// The spec makes four B x H x Q x T tensors a group and adds up outputs that were rounded. Here a
// warp holds 16 queries of a head and meets one group of keys after another: scores and softmax
// stay in registers, each group's sum goes into one float32 accumulator, q is read and out written
// once.

#pragma once

#include "attention_tile.h"

namespace lorakern {

// One group's sum over its keys, each with exp2(score - top); rescaled when top rises
template <int kD>
struct RunningSoftmax {
  float sums[2 * kSteps<kD>][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};

  // scores to exponentials; scores past `count` are left out
  __device__ __forceinline__ void meet(float (&s)[2][4], float factor, int count) {
    const int t = threadIdx.x % 4;
    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = s[i / 4][i % 4];
      score = i / 4 * 8 + 2 * t + i % 2 < count ? score * factor : -INFINITY;
      higher[i % 4 / 2] = max(higher[i % 4 / 2], score);
    }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      higher[r] = largest_of_row(higher[r]);
      shrink[r] = exp2f(top[r] - higher[r]);
      top[r] = higher[r];
      total[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < 2 * kSteps<kD>; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& e = s[i / 4][i % 4];
      e = exp2f(e - top[i % 4 / 2]);
      total[i % 4 / 2] += e;
    }
  }
};

// out[B, Q, H kD] = sum over groups of scale mask softmax(q k^T / sqrt(kD)) v; a block is kQueries
// queries of a head
template <typename scalar_t, bool kBf16, int kD>
__global__ void __launch_bounds__(kAttentionThreads, kResident<kD>)
    decoupled_attention_fwd_kernel(scalar_t* __restrict__ out, const scalar_t* __restrict__ q,
                                   const __grid_constant__ AttentionGroups<scalar_t> groups,
                                   AttentionSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const k_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t* const v_s = k_s + sizes.tile * kPitch<kD>;
  const int64_t blocks_Q = (sizes.Q + kQueries - 1) / kQueries;
  const Head<kD> head(blockIdx.x / blocks_Q, sizes.H);
  const int64_t first_row = blockIdx.x % blocks_Q * kQueries;
  const int64_t row = first_row + threadIdx.x / 32 * 16;

  const auto of_q = rows_of_warp<kHolds<kD>, kD>(
      v_s + sizes.tile * kPitch<kD>, q + head.at(sizes.Q, 0), head.C, first_row, sizes.Q);
  float acc[2 * kSteps<kD>][4] = {};
  for (int j = 0; j < groups.count; ++j) {
    const auto& group = groups.at[j];
    RunningSoftmax<kD> softmax;
    for (int first = 0; first < group.T; first += sizes.tile) {
      const int count = min(group.T - first, sizes.tile);
      __syncthreads();
      stage<kD>(k_s, group.k + head.at(group.T, first), head.C, count);
      stage<kD>(v_s, group.v + head.at(group.T, first), head.C, count);
      __syncthreads();
      for (int key = 0; key < count; key += 16) {
        float s[2][4];
        rows_by_rows<kD, kBf16>(s, of_q, k_s + key * kPitch<kD>);
        softmax.meet(s, sizes.factor, count - key);
        // not yet scaled and at most 1: rounded to 16 bits it keeps its precision
        add_weighted_rows<kD, kBf16>(softmax.sums, s, v_s + key * kPitch<kD>);
      }
    }
    float share[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t of = row + threadIdx.x % 32 / 4 + 8 * r;
      share[r] = group.scale * mask_of(group, head.b, of, sizes.Q) / sum_of_row(softmax.total[r]);
    }
#pragma unroll
    for (int n = 0; n < 2 * kSteps<kD>; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] += share[i / 2] * softmax.sums[n][i];
  }
  each_pair<kD>(acc, [&](int r, int col, float first, float second) {
    if (row + r < sizes.Q)
      store_pack(out + head.at(sizes.Q, row + r) + col, rounded<scalar_t>(first, second));
  });
}

}  // namespace lorakern
