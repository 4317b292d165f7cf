// The second stage of a sum over blocks: partial results are added in a fixed order, so that a
// gradient has the same bits on every run.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorakern {

constexpr int kSumLanes = 32, kSumRows = 16;

// out[n] = sum over p < count of parts[p, n]; a block makes kSumLanes sums, each in kSumRows runs
template <typename out_t, typename acc_t>
__global__ void __launch_bounds__(kSumLanes* kSumRows)
    sum_parts_kernel(out_t* __restrict__ out, const acc_t* __restrict__ parts, int64_t size,
                     int64_t count) {
  __shared__ acc_t runs[kSumRows][kSumLanes];
  const int lane = threadIdx.x % kSumLanes, row = threadIdx.x / kSumLanes;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kSumLanes + lane;

  acc_t sum = 0;
  if (n < size)
    for (int64_t p = row; p < count; p += kSumRows) sum += parts[p * size + n];
  runs[row][lane] = sum;
  __syncthreads();
  if (row > 0 || n >= size) return;
  for (int r = 1; r < kSumRows; ++r) sum += runs[r][lane];
  out[n] = static_cast<out_t>(sum);
}

}  // namespace lorakern
