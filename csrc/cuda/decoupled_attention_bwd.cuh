// decoupled_attention on CUDA, backward. Spec: lorakern/ops/decoupled_attention/reference.py
//
// Only q, keys and values are kept. One pass over the queries makes their gradient and, of each
// wanted group, the logarithm of the softmax's sum and rowsum(p dp): exact, as both are sums over
// a group's keys alone. From them a second pass over the keys makes dk and dv, whose sum over
// queries is cut into parts that are added up in a fixed order.

#pragma once

#include "attention_tile.h"

namespace lorakern {

// dq[B, Q, H kD], or null, and each group's stats, or null; a block is kQueries queries of a head
template <typename scalar_t, bool kBf16, int kD>
__global__ void __launch_bounds__(kAttentionThreads, kResident<kD>)
    decoupled_attention_dq_kernel(scalar_t* __restrict__ dq, const scalar_t* __restrict__ dout,
                                  const scalar_t* __restrict__ q,
                                  const __grid_constant__ AttentionGroups<scalar_t> groups,
                                  AttentionSizes sizes) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const k_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t* const v_s = k_s + sizes.tile * kPitch<kD>;
  const int64_t blocks_Q = (sizes.Q + kQueries - 1) / kQueries;
  const Head<kD> head(blockIdx.x / blocks_Q, sizes.H);
  const int64_t first_row = blockIdx.x % blocks_Q * kQueries;
  const int64_t row = first_row + threadIdx.x / 32 * 16;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  const auto of_q = rows_of_warp<kHolds<kD>, kD>(
      v_s + sizes.tile * kPitch<kD>, q + head.at(sizes.Q, 0), head.C, first_row, sizes.Q);
  const HeldRows<scalar_t, kD> of_dout(dout + head.at(sizes.Q, 0), head.C, row, sizes.Q);
  float acc[2 * kSteps<kD>][4] = {};
  for (int j = 0; j < groups.count; ++j) {
    const auto& group = groups.at[j];
    if (!dq && !group.stats) continue;
    // visit(s, dp, key, count) for each step of 16 keys of which `count` are there; s in base 2
    const auto each_step = [&](bool staged, const auto& visit) {
      for (int first = 0; first < group.T; first += sizes.tile) {
        const int count = min(group.T - first, sizes.tile);
        if (!staged) {
          __syncthreads();
          stage<kD>(k_s, group.k + head.at(group.T, first), head.C, count);
          stage<kD>(v_s, group.v + head.at(group.T, first), head.C, count);
          __syncthreads();
        }
        for (int key = 0; key < count; key += 16) {
          float s[2][4], dp[2][4];
          rows_by_rows<kD, kBf16>(s, of_q, k_s + key * kPitch<kD>);
          rows_by_rows<kD, kBf16>(dp, of_dout, v_s + key * kPitch<kD>);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const bool in = i / 4 * 8 + 2 * t + i % 2 < count - key;
            s[i / 4][i % 4] = in ? s[i / 4][i % 4] * sizes.factor : -INFINITY;
          }
          visit(s, dp, key);
        }
      }
    };

    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, mean[2] = {}, weight[2];
    each_step(false, [&](float(&s)[2][4], float(&dp)[2][4], int) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* const of[2] = {s[0] + 2 * r, s[1] + 2 * r};
        const float* const dp_of[2] = {dp[0] + 2 * r, dp[1] + 2 * r};
        const float most = max(max(of[0][0], of[0][1]), max(of[1][0], of[1][1]));
        const float higher = max(top[r], largest_of_row(most)), shrink = exp2f(top[r] - higher);
        top[r] = higher;
        total[r] *= shrink;
        mean[r] *= shrink;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float e = exp2f(of[i / 2][i % 2] - higher);
          total[r] += e;
          mean[r] += e * dp_of[i / 2][i % 2];
        }
      }
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = row + g + 8 * r, heads = gridDim.x / blocks_Q;
      total[r] = sum_of_row(total[r]);
      mean[r] = sum_of_row(mean[r]) / total[r];
      top[r] += log2f(total[r]);
      weight[r] = group.scale * mask_of(group, head.b, at, sizes.Q);
      if (group.stats && t == 0 && at < sizes.Q) {
        float* const to = group.stats + (head.b * sizes.H + head.h) * sizes.Q + at;
        to[0] = top[r];
        to[heads * sizes.Q] = mean[r];
      }
    }
    if (!dq) continue;
    // a group that fits is still in shared memory
    each_step(group.T <= sizes.tile, [&](float(&s)[2][4], float(&dp)[2][4], int key) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = i % 4 / 2;
        float& ds = s[i / 4][i % 4];
        ds = weight[r] * exp2f(ds - top[r]) * (dp[i / 4][i % 4] - mean[r]);
      }
      add_weighted_rows<kD, kBf16>(acc, s, k_s + key * kPitch<kD>);
    });
  }
  if (!dq) return;
  each_pair<kD>(acc, [&](int r, int col, float first, float second) {
    if (row + r < sizes.Q)
      store_pack(dq + head.at(sizes.Q, row + r) + col,
                 rounded<scalar_t>(sizes.scale * first, sizes.scale * second));
  });
}

// Blocks that share the channels of a wide head's dk and dv: both would not fit in registers
template <int kD>
constexpr int kShares = kD <= 80 ? 1 : 2;

// dk_parts, dv_parts [part, B T, H kD] of one group: a block is 16 key_warps keys of a head, kD /
// kShares channels, and `share` queries, in whole tiles of kQueries.
//
// Its warps share the keys, or else the queries of a tile: then each makes a part of its own.
template <typename scalar_t, bool kBf16, int kD>
__global__ void __launch_bounds__(kAttentionThreads, kD <= 48 ? 3 : 2)
    decoupled_attention_dkv_kernel(float* __restrict__ dk_parts, float* __restrict__ dv_parts,
                                   const scalar_t* __restrict__ dout,
                                   const scalar_t* __restrict__ q, AttentionGroup<scalar_t> group,
                                   AttentionSizes sizes, int64_t B, int64_t share, int key_warps) {
  extern __shared__ __align__(32) unsigned char dynamic_shared[];
  scalar_t* const k_s = reinterpret_cast<scalar_t*>(dynamic_shared);
  scalar_t* const v_s = k_s + 16 * key_warps * kPitch<kD>;
  scalar_t* const q_s = v_s + 16 * key_warps * kPitch<kD>;
  scalar_t* const dout_s = q_s + kQueries * kPitch<kD>;
  float* const top_s = reinterpret_cast<float*>(dout_s + kQueries * kPitch<kD>);
  float *const mean_s = top_s + kQueries, *const mask_s = mean_s + kQueries;

  const int64_t heads = B * sizes.H;
  constexpr int kTiles = 2 * kSteps<kD> / kShares<kD>;
  const int64_t block = blockIdx.x / kShares<kD>;
  const int from_col = blockIdx.x % kShares<kD> * 8 * kTiles;
  const int blocks_T = (group.T + 16 * key_warps - 1) / (16 * key_warps);
  const Head<kD> head(block / blocks_T % heads, sizes.H);
  const int64_t slice = block / blocks_T / heads;
  const int first = block % blocks_T * 16 * key_warps;
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
  const int key_warp = warp % key_warps, query_warp = warp / key_warps,
            query_warps = kAttentionWarps / key_warps;

  const int keys = min(group.T - first, 16 * key_warps);
  stage<kD>(k_s, group.k + head.at(group.T, first), head.C, keys);
  stage<kD>(v_s, group.v + head.at(group.T, first), head.C, keys);
  const StagedRows<scalar_t, kD> of_k{k_s + 16 * key_warp * kPitch<kD>};
  const StagedRows<scalar_t, kD> of_v{v_s + 16 * key_warp * kPitch<kD>};

  float dk[kTiles][4] = {}, dv[kTiles][4] = {};
  const int64_t end = min(sizes.Q, (slice + 1) * share);
  for (int64_t row = slice * share; row < end; row += kQueries) {
    const int count = static_cast<int>(min(end - row, int64_t{kQueries}));
    __syncthreads();
    stage<kD>(q_s, q + head.at(sizes.Q, row), head.C, count);
    stage<kD>(dout_s, dout + head.at(sizes.Q, row), head.C, count);
    if (threadIdx.x < kQueries) {
      const int n = threadIdx.x;
      const float* const stats = group.stats + (head.b * sizes.H + head.h) * sizes.Q + row + n;
      // past the queries exp2(s - top) is 0
      top_s[n] = n < count ? stats[0] : INFINITY;
      mean_s[n] = n < count ? stats[heads * sizes.Q] : 0.0f;
      mask_s[n] = mask_of(group, head.b, row + n, end);
    }
    __syncthreads();
    if (key_warp * 16 >= keys) continue;
#pragma unroll 1
    for (int n = 16 * query_warp; n < count; n += 16 * query_warps) {
      // of 16 keys and 16 queries
      float p[2][4], ds[2][4];
      rows_by_rows<kD, kBf16>(p, of_k, q_s + n * kPitch<kD>);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int at = n + i / 4 * 8 + 2 * t + i % 2;
        float& of_p = p[i / 4][i % 4];
        of_p = exp2f(of_p * sizes.factor - top_s[at]) * mask_s[at];
      }
      add_weighted_rows<kD, kBf16>(dv, p, dout_s + n * kPitch<kD> + from_col);
      rows_by_rows<kD, kBf16>(ds, of_v, dout_s + n * kPitch<kD>);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        ds[i / 4][i % 4] =
            p[i / 4][i % 4] * (ds[i / 4][i % 4] - mean_s[n + i / 4 * 8 + 2 * t + i % 2]);
      add_weighted_rows<kD, kBf16>(dk, ds, q_s + n * kPitch<kD> + from_col);
    }
  }

  const int64_t part = (slice * query_warps + query_warp) * B * group.T;
  const auto put = [&](float* parts, const float (&sums)[kTiles][4], float by) {
    each_pair<kD>(sums, [&](int r, int col, float a, float b) {
      const int key = first + 16 * key_warp + r;
      if (key < group.T)
        store_pack(parts + part * head.C + head.at(group.T, key) + from_col + col,
                   Pack<float, 2>{{by * a, by * b}});
    });
  };
  put(dk_parts, dk, group.scale * sizes.scale);
  put(dv_parts, dv, group.scale);
}

}  // namespace lorakern
