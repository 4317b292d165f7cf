// kron_delta on CUDA. Spec: lorakern/ops/kron_delta/reference.py
//
// Bound by memory: dw is written once in whole packs, and ddelta is read once for both gradients.
// The spec's reordered copy of ddelta is not made. C [A, B] and D [P, Q], all row-major; acc_t is
// the type of the sums.

#pragma once

#include "pack.h"

namespace lorakern {

constexpr int kKronWarps = 8, kKronThreads = 32 * kKronWarps;
// entries of D that a block of the backward kernel holds, kKronLane of them a lane
constexpr int kKronLane = 8, kKronTile = 32 * kKronLane;

// dw[A P, B Q] = scale * c[A, B] (x) d[P, Q]; a warp is a row, a lane a pack of kPack, Q % kPack =
// 0
template <typename scalar_t, typename acc_t, int kPack>
__global__ void __launch_bounds__(kKronThreads)
    kron_delta_fwd_kernel(scalar_t* __restrict__ dw, const scalar_t* __restrict__ c,
                          const scalar_t* __restrict__ d, acc_t scale, int64_t A, int64_t B,
                          int64_t P, int64_t Q) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kKronWarps + threadIdx.x / 32;
  if (row >= A * P) return;
  const scalar_t *c_row = c + row / P * B, *d_row = d + row % P * Q;
  // lanes count packs: pack q of block b of the row
  const int64_t packs = Q / kPack;
  int64_t b = threadIdx.x % 32 / packs, q = threadIdx.x % 32 % packs;
  const int64_t step_b = 32 / packs, step_q = 32 % packs;
  for (; b < B; b += step_b, q += step_q) {
    if (q >= packs) {
      q -= packs;
      if (++b >= B) return;
    }
    const acc_t factor = scale * static_cast<acc_t>(c_row[b]);
    const auto from = load_pack<kPack>(d_row + q * kPack);
    Pack<scalar_t, kPack> out;
#pragma unroll
    for (int n = 0; n < kPack; ++n)
      out.at[n] = static_cast<scalar_t>(factor * static_cast<acc_t>(from.at[n]));
    store_pack(dw + row * B * Q + b * Q + q * kPack, out);
  }
}

// dc_parts[part, A, B] and dd_parts[part, P, Q]; scale * c (x) d = dw. Null where not wanted.
//
// A block holds kKronTile entries of D and walks `share` entries of C: dd_parts has one part a
// share of C, dc_parts one a tile of D. Its warps take the entries of the share in turns.
template <typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kKronThreads)
    kron_delta_bwd_kernel(acc_t* __restrict__ dc_parts, acc_t* __restrict__ dd_parts,
                          const scalar_t* __restrict__ ddelta, const scalar_t* __restrict__ c,
                          const scalar_t* __restrict__ d, acc_t scale, int64_t A, int64_t B,
                          int64_t P, int64_t Q, int64_t share) {
  __shared__ acc_t dd_s[kKronWarps][kKronTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = (P * Q + kKronTile - 1) / kKronTile;
  const int64_t tile = blockIdx.x % tiles, part = blockIdx.x / tiles;

  // the lane's entries of D, and where they lie in the block of dw that one entry of C makes
  int64_t offset[kKronLane];
  acc_t d_of[kKronLane], dd[kKronLane] = {};
#pragma unroll
  for (int n = 0; n < kKronLane; ++n) {
    const int64_t entry = tile * kKronTile + n * 32 + lane;
    offset[n] = entry < P * Q ? entry / Q * B * Q + entry % Q : -1;
    d_of[n] = entry < P * Q ? scale * static_cast<acc_t>(d[entry]) : acc_t(0);
  }
  const int64_t end = min(A * B, (part + 1) * share);
  for (int64_t entry = part * share + warp; entry < end; entry += kKronWarps) {
    const scalar_t* const from = ddelta + entry / B * P * B * Q + entry % B * Q;
    const acc_t c_of = scale * static_cast<acc_t>(c[entry]);
    acc_t dc = 0;
#pragma unroll
    for (int n = 0; n < kKronLane; ++n) {
      const acc_t dw = offset[n] < 0 ? acc_t(0) : static_cast<acc_t>(from[offset[n]]);
      dc += d_of[n] * dw;
      dd[n] += c_of * dw;
    }
    if (!dc_parts) continue;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) dc += __shfl_xor_sync(0xFFFFFFFF, dc, by);
    if (lane == 0) dc_parts[tile * A * B + entry] = dc;
  }
  if (!dd_parts) return;
#pragma unroll
  for (int n = 0; n < kKronLane; ++n) dd_s[warp][n * 32 + lane] = dd[n];
  __syncthreads();
  const int64_t entry = tile * kKronTile + threadIdx.x;
  if (entry >= P * Q) return;
  acc_t sum = 0;
  for (int w = 0; w < kKronWarps; ++w) sum += dd_s[w][threadIdx.x];
  dd_parts[part * P * Q + entry] = sum;
}

static_assert(kKronTile == kKronThreads, "a thread sums one entry of D over the warps");

}  // namespace lorakern
