// Copies from global to shared memory that a thread waits for later. It hands them over in groups.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lorakern {

// one instruction a function; where nvcc does not compile, the host that runs kernels has its own
#ifdef __CUDACC__

// 16 bytes, at addresses that are multiples of it; zeros, and `from` is not read, unless `there`
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool there) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(at), "l"(from), "r"(there ? 16 : 0)
               : "memory");
#else
  __trap();
#endif
}

// The copies since the last call are a group
__device__ __forceinline__ void end_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All of this thread's groups but the last kLater are there; others' are after a barrier
template <int kLater>
__device__ __forceinline__ void wait_copies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
#endif
}

#endif

}  // namespace lorakern
