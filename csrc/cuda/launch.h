// What every CUDA launcher needs: a checked launch on torch's current stream, and the sum of
// partial results.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <limits>
#include <vector>

#include "../check.h"
#include "sum_parts.h"

namespace lorakern {

// Blocks that a launcher aims at: some 8 for each multiprocessor of a large GPU. It cuts sums by
// this number and not by the device's, so that they have the same bits everywhere.
#ifndef LORAKERN_BLOCKS
#define LORAKERN_BLOCKS 1024
#endif
constexpr int64_t kBlocks = LORAKERN_BLOCKS;

// the most dynamic shared memory of a kernel that has not asked for more, in bytes
constexpr size_t kFreeShared = 48 * 1024;

inline int64_t ceil_div(int64_t size, int64_t by) { return (size + by - 1) / by; }

// contiguous, and at an address that whole packs are read from
inline at::Tensor aligned(const at::Tensor& t) {
  const at::Tensor whole = t.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

// The gradient of a factor: zeros where no kernel will write it, of size 0 where it is not needed
inline at::Tensor make_grad(const at::Tensor& factor, bool needed, bool written) {
  const std::vector<int64_t> sizes = needed ? factor.sizes().vec() : std::vector<int64_t>{0};
  return written ? at::empty(sizes, factor.options()) : at::zeros(sizes, factor.options());
}

// args convert to the kernel's parameters; shared in bytes
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Args... args) {
  if (blocks == 0) return;
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int>::max(), "want at most 2^31 - 1 blocks, got ",
                    blocks);
  if (shared > kFreeShared)
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared)));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// out = the sum of parts [count, out.numel()]
template <typename out_t, typename acc_t>
void sum_parts(at::Tensor& out, const at::Tensor& parts) {
  if (out.numel() == 0) return;
  launch(&sum_parts_kernel<out_t, acc_t>, ceil_div(out.numel(), kSumLanes), kSumLanes * kSumRows, 0,
         out.template mutable_data_ptr<out_t>(), parts.template const_data_ptr<acc_t>(),
         out.numel(), parts.numel() / out.numel());
}

}  // namespace lorakern
