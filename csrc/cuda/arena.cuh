// A clipped step of AdamW over flat buffers on CUDA. Spec: lorakern/adamw.py
//
// The norm is one pass over the gradients. The step is another over gradients, weights, moments and
// average, each read once and all but the first written once; torch's clip, step, average and zero
// pass over them four times. What changes between steps (learning rate, steps made, norm) is read
// from device memory and no grid depends on a value, so that a graph replays them.

#pragma once

#include "../adamw.h"
#include "pack.h"

namespace lorakern {

// a block takes kArenaChunk elements at a time, a thread a pack of kArenaPack of them
constexpr int kArenaThreads = 256, kArenaWarps = kArenaThreads / 32, kArenaPack = 4,
              kArenaChunk = kArenaThreads * kArenaPack;
// segments of a launch: some 3 of the 4 KiB that the arguments of a kernel may have
constexpr int kArenaSegments = 32;

// Buffers of one length, each with one learning rate; average may be null
struct ArenaSegment {
  float *params, *grad, *exp_avg, *exp_avg_sq, *average;
  // scalars: steps made, and the learning rate
  float* step;
  const float* lr;
  Hyper hyper;
  int64_t size;
  // chunks of the segments before
  int64_t chunk;
  // whether all five begin where packs may
  bool packed;
};

struct ArenaSegments {
  ArenaSegment at[kArenaSegments];
  int count;
  int64_t chunks;
};

using ArenaPack = Pack<float, kArenaPack>;

// `size` values, 0 behind them; a whole pack where kWhole
template <bool kWhole>
__device__ __forceinline__ ArenaPack load_some(const float* from, int64_t size) {
  if constexpr (kWhole) {
    return load_pack<kArenaPack>(from);
  } else {
    ArenaPack values;
#pragma unroll
    for (int n = 0; n < kArenaPack; ++n) values.at[n] = n < size ? from[n] : 0.f;
    return values;
  }
}

template <bool kWhole>
__device__ __forceinline__ void store_some(float* to, int64_t size, const ArenaPack& values) {
  if constexpr (kWhole) {
    store_pack(to, values);
  } else {
#pragma unroll
    for (int n = 0; n < kArenaPack; ++n)
      if (n < size) to[n] = values.at[n];
  }
}

// visit<kWhole>(number, segment, i): the thread's packs, which begin at place i of a segment
template <typename Visit>
__device__ __forceinline__ void each_pack(const ArenaSegments& segments, const Visit& visit) {
  int s = 0;
  for (int64_t chunk = blockIdx.x; chunk < segments.chunks; chunk += gridDim.x) {
    while (s + 1 < segments.count && chunk >= segments.at[s + 1].chunk) ++s;
    const ArenaSegment& segment = segments.at[s];
    const int64_t i = (chunk - segment.chunk) * kArenaChunk + threadIdx.x * kArenaPack;
    if (segment.packed && i + kArenaPack <= segment.size) {
      visit.template operator()<true>(s, segment, i);
    } else if (i < segment.size) {
      visit.template operator()<false>(s, segment, i);
    }
  }
}

// The sum of the block's values, in every thread of its first warp
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double sums[kArenaWarps];
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int w = 0; w < kArenaWarps; ++w) value += sums[w];
  return value;
}

// parts[block] = its share of the sum of all squares of the gradients
__global__ void __launch_bounds__(kArenaThreads)
    arena_squares_kernel(double* __restrict__ parts,
                         const __grid_constant__ ArenaSegments segments) {
  // a thread's own sum is of few terms: some 40 packs of 42 million elements on 1024 blocks
  float sums[kArenaPack] = {};
  each_pack(segments, [&]<bool kWhole>(int, const ArenaSegment& segment, int64_t i) {
    const ArenaPack g = load_some<kWhole>(segment.grad + i, segment.size - i);
#pragma unroll
    for (int n = 0; n < kArenaPack; ++n) sums[n] += g.at[n] * g.at[n];
  });
  double sum = 0;
#pragma unroll
  for (int n = 0; n < kArenaPack; ++n) sum += sums[n];
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// norm = the root of the sum of `count` parts; one block
__global__ void __launch_bounds__(kArenaThreads)
    arena_norm_kernel(float* __restrict__ norm, const double* __restrict__ parts, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kArenaThreads) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

// What the elements of each segment meet, a thread a segment; one block. A step is counted unless
// the norm is there and not finite: then *skipped is 1, else 0
__global__ void __launch_bounds__(kArenaSegments)
    arena_rates_kernel(Rates<float>* __restrict__ rates, float* __restrict__ skipped,
                       const float* __restrict__ norm, double largest, double memory,
                       const __grid_constant__ ArenaSegments segments) {
  const double n = norm ? *norm : 0.;
  const bool skip = !is_finite(n);
  if (threadIdx.x == 0) *skipped = skip ? 1.f : 0.f;
  if (static_cast<int>(threadIdx.x) >= segments.count || skip) return;
  const ArenaSegment& segment = segments.at[threadIdx.x];
  const float step = *segment.step += 1;
  rates[threadIdx.x] =
      rates_of(segment.hyper, *segment.lr, step, clip_factor(n, largest), memory);
}

// The step, in place, unless *skipped; gradients become zeros in either case where kZero
template <bool kAverage, bool kZero>
__global__ void __launch_bounds__(kArenaThreads)
    arena_step_kernel(const Rates<float>* __restrict__ rates, const float* __restrict__ skipped,
                      const __grid_constant__ ArenaSegments segments) {
  const bool skip = *skipped != 0;
  if (skip && !kZero) return;
  each_pack(segments, [&]<bool kWhole>(int s, const ArenaSegment& segment, int64_t i) {
    // of their own, or stores are not packed
    float *const __restrict__ params = segment.params + i,
                 *const __restrict__ grad = segment.grad + i,
                 *const __restrict__ exp_avg = segment.exp_avg + i,
                 *const __restrict__ exp_avg_sq = segment.exp_avg_sq + i,
                 *const __restrict__ average = kAverage ? segment.average + i : nullptr;
    const int64_t size = segment.size - i;
    if (!skip) {
      const Rates<float> rate = rates[s];
      const ArenaPack g = load_some<kWhole>(grad, size);
      ArenaPack p = load_some<kWhole>(params, size), m = load_some<kWhole>(exp_avg, size),
                v = load_some<kWhole>(exp_avg_sq, size), a;
      if constexpr (kAverage) a = load_some<kWhole>(average, size);
#pragma unroll
      for (int n = 0; n < kArenaPack; ++n) {
        add_gradient(m.at[n], v.at[n], g.at[n], rate);
        p.at[n] = stepped(p.at[n], m.at[n], sqrtf(v.at[n]), rate);
        if constexpr (kAverage) a.at[n] += rate.to_p * (p.at[n] - a.at[n]);
      }
      store_some<kWhole>(params, size, p);
      store_some<kWhole>(exp_avg, size, m);
      store_some<kWhole>(exp_avg_sq, size, v);
      if constexpr (kAverage) store_some<kWhole>(average, size, a);
    }
    if constexpr (kZero) store_some<kWhole>(grad, size, ArenaPack{});
  });
}

}  // namespace lorakern
