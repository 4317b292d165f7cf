// The matrix instructions of csrc/cuda/mma.h, lane by lane: PTX ISA, "Matrix Fragments for
// mma.m16n8k16" and "ldmatrix"; and the copies of copy_async.h: "cp.async".

#pragma once

#include <cstdint>
#include <cstring>

namespace lorakern {

template <bool kBf16>
float widened(uint32_t word, int half) {
  const uint16_t bits = word >> 16 * half;
  if constexpr (kBf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  } else {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
}

template <bool kBf16>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int g = cuda_host::lane() / 4, t = cuda_host::lane() % 4;
  struct A {
    uint32_t words[4];
  } mine = {{a[0], a[1], a[2], a[3]}};
  struct B {
    uint32_t words[2];
  };
  const auto all_a = cuda_host::publish(mine);
  float row[2][16];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 16; ++k)
      row[r][k] = widened<kBf16>(all_a(4 * g + k % 8 / 2).words[r + k / 8 * 2], k % 2);
  const auto all_b = cuda_host::publish(B{{b0, b1}});
  for (int i = 0; i < 4; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += row[i / 2][k] *
             widened<kBf16>(all_b(4 * (2 * t + i % 2) + k % 8 / 2).words[k / 8], k % 2);
    sums[i] += sum;
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&words)[4], const void* shared) {
  const int g = cuda_host::lane() / 4, t = cuda_host::lane() % 4;
  if (reinterpret_cast<uintptr_t>(shared) % 16)
    throw std::logic_error("a row of a matrix at an odd address");
  const auto row = cuda_host::publish(static_cast<const uint16_t*>(shared));
  for (int i = 0; i < 4; ++i) {
    uint32_t halves[2];
    for (int n = 0; n < 2; ++n)
      halves[n] = kTransposed ? row(8 * i + 2 * t + n)[g] : row(8 * i + g)[2 * t + n];
    words[i] = halves[0] | halves[1] << 16;
  }
}

inline void copy_async(void* shared, const void* from, bool there) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16))
    throw std::logic_error("a copy from or to an odd address");
  cuda_host::block.threads[cuda_host::block.current].copies.back().push_back(
      {shared, there ? from : nullptr});
}

inline void end_copies() {
  cuda_host::block.threads[cuda_host::block.current].copies.emplace_back();
}

template <int kLater>
void wait_copies() {
  auto& groups = cuda_host::block.threads[cuda_host::block.current].copies;
  while (groups.size() > kLater + 1) {
    for (const auto& copy : groups.front()) {
      if (copy.from) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace lorakern
