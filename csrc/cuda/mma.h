// Products of 16-bit matrices by a warp, with float32 sums.
//
// Lane l of a warp has g = l / 4 and t = l % 4. Of a 16 x 8 tile of sums it holds rows g (values 0
// and 1) and g + 8 (2 and 3), columns 2 t and 2 t + 1. An operand is held in words of two values.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "pack.h"

namespace lorakern {

// one instruction a function; where nvcc does not compile, the host that runs kernels has its own
#ifdef __CUDACC__

// sums[16, 8] += a[16, 16] b[16, 8]
template <bool kBf16>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  __trap();
#endif
}

// Four 8 x 8 matrices, each word's row of one at lane l's address for matrix l / 8; a lane gets of
// each the values (g, 2 t) and (g, 2 t + 1), or transposed (2 t, g) and (2 t + 1, g).
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* shared) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 750
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  }
#else
  __trap();
#endif
}

#endif

template <typename scalar_t>
__device__ __forceinline__ Pack<scalar_t, 2> rounded(float low, float high) {
  return {{static_cast<scalar_t>(low), static_cast<scalar_t>(high)}};
}

template <typename scalar_t>
__device__ __forceinline__ uint32_t word(const Pack<scalar_t, 2>& both) {
  uint32_t bits;
  memcpy(&bits, &both, sizeof(bits));
  return bits;
}

// A 16 x 16 tile of sums as the left operand of a further product
template <typename scalar_t>
__device__ __forceinline__ void as_operand(uint32_t (&words)[4], const float (&sums)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const from = sums[i / 2] + i % 2 * 2;
    words[i] = word(rounded<scalar_t>(from[0], from[1]));
  }
}

// A 16 x 16 tile in shared memory, whose rows are `pitch` apart, as a left operand; transposed: as
// two right operands of 8 columns each, over its rows
template <bool kTransposed, typename scalar_t>
__device__ __forceinline__ void load_tile(uint32_t (&words)[4], const scalar_t* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<kTransposed>(words, tile + lane % 16 * pitch + lane / 16 * 8);
}

// Its transpose as a left operand
template <typename scalar_t>
__device__ __forceinline__ void load_columns(uint32_t (&words)[4], const scalar_t* tile,
                                             int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<true>(words, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
}

// The same tile as two right operands, each of 8 of its rows, over its columns
template <typename scalar_t>
__device__ __forceinline__ void load_rows(uint32_t (&words)[4], const scalar_t* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(words, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
}

}  // namespace lorakern
