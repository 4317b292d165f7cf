// Panels of a matrix in the lanes that tile.h multiplies, and 16-bit rows to float32 and back.

#pragma once

#include <algorithm>
#include <type_traits>

#include "tile.h"

namespace lorakern {

template <typename scalar_t, typename acc_t>
inline void widen(acc_t* out, const scalar_t* in, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(out, in, n * sizeof(acc_t));
  } else {
    using Vec = at::vec::Vectorized<acc_t>;
    int64_t i = 0;
    for (; i + 2 * Vec::size() <= n; i += 2 * Vec::size()) {
      Vec low, high;
      at::vec::load_to_float<scalar_t>(in + i, low, high);
      low.store(out + i);
      high.store(out + i + Vec::size());
    }
    for (; i < n; ++i) out[i] = static_cast<acc_t>(in[i]);
  }
}

// out[i] = in[i] + bias[i], rounded once; bias may be null
template <typename scalar_t, typename acc_t>
inline void narrow(scalar_t* out, const acc_t* in, const acc_t* bias, int64_t n) {
  using Vec = at::vec::Vectorized<acc_t>;
  const auto sum = [&](int64_t i) {
    const Vec v = Vec::loadu(in + i);
    return bias ? v + Vec::loadu(bias + i) : v;
  };
  int64_t i = 0;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    for (; i + Vec::size() <= n; i += Vec::size()) sum(i).store(out + i);
  } else {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      for (; i + 2 * Vec::size() <= n; i += 2 * Vec::size()) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(sum(i + Vec::size()), sum(i));
        std::memcpy(out + i, &pairs, sizeof(pairs));
      }
    }
#endif
    for (; i + 2 * Vec::size() <= n; i += 2 * Vec::size())
      at::vec::convert_from_float<scalar_t>(sum(i), sum(i + Vec::size())).store(out + i);
  }
  for (; i < n; ++i) out[i] = static_cast<scalar_t>(bias ? in[i] + bias[i] : in[i]);
}

// dst[k, width] = src[cols, k]ᵀ, zero beyond cols; src has one row per column of the panel
template <typename scalar_t, typename acc_t>
void pack_transposed(acc_t* dst, int64_t width, const scalar_t* src, int64_t ld, int64_t cols,
                     int64_t k) {
  constexpr int kSide = std::min(16, kPanel<acc_t>);
  acc_t square[kSide * kSide];
  for (int64_t c0 = 0; c0 < width; c0 += kSide) {
    const int64_t n = std::clamp<int64_t>(cols - c0, 0, std::min<int64_t>(kSide, width - c0));
    for (int64_t k0 = 0; k0 < k; k0 += kSide) {
      const int64_t depth = std::min<int64_t>(kSide, k - k0);
      acc_t* out = dst + k0 * width + c0;
      const scalar_t* in = src + c0 * ld + k0;
      if (n == kSide && depth == kSide) {
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          at::vec::transpose_mxn<acc_t, kSide, kSide>(in, ld, out, width);
        } else {
          for (int i = 0; i < kSide; ++i) widen(square + i * kSide, in + i * ld, kSide);
          at::vec::transpose_mxn<acc_t, kSide, kSide>(square, kSide, out, width);
        }
        continue;
      }
      const int64_t room = std::min<int64_t>(kSide, width - c0);
      for (int64_t j = 0; j < depth; ++j) {
        for (int64_t i = 0; i < n; ++i) out[j * width + i] = static_cast<acc_t>(in[i * ld + j]);
        for (int64_t i = n; i < room; ++i) out[j * width + i] = acc_t(0);
      }
    }
  }
}

// dst[k, width] = src[k, cols], zero beyond cols
template <typename scalar_t, typename acc_t>
void pack_rows(acc_t* dst, int64_t width, const scalar_t* src, int64_t ld, int64_t cols,
               int64_t k) {
  for (int64_t j = 0; j < k; ++j) {
    widen(dst + j * width, src + j * ld, cols);
    std::fill(dst + j * width + cols, dst + (j + 1) * width, acc_t(0));
  }
}

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
// out[2 n] = even[0], odd[0], even[1], odd[1], ... of n 16-bit values each, at most 32; zeros for
// an odd that is null
inline void interleave(at::BFloat16* out, const at::BFloat16* even, const at::BFloat16* odd,
                       int64_t n) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 64> order{};
    for (int16_t i = 0; i < 64; ++i) order[i] = static_cast<int16_t>(i / 2 + 32 * (i % 2));
    return order;
  }();
  const auto some = static_cast<__mmask32>((uint64_t(1) << n) - 1);
  const __m512i a = _mm512_maskz_loadu_epi16(some, even);
  const __m512i b = odd ? _mm512_maskz_loadu_epi16(some, odd) : _mm512_setzero_si512();
  for (int64_t first = 0; first < n; first += 16) {
    const int64_t pairs = std::min<int64_t>(16, n - first);
    const __m512i order = _mm512_load_si512(kOrder.data() + 2 * first);
    _mm512_mask_storeu_epi32(out + 2 * first, static_cast<__mmask16>((1u << pairs) - 1),
                             _mm512_permutex2var_epi16(a, order, b));
  }
}
#endif

// Lanes of float32 as pairs whose products with a bfloat16 that is there twice add up to 16 bits
// of the float32: each becomes its bfloat16 and what that leaves out.
inline void split_pairs(float* lanes, int64_t n) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? (1 << (n - i)) - 1 : 0xffff;
    const __m512 value = _mm512_maskz_loadu_ps(some, lanes + i);
    const __m512i high = _mm512_slli_epi32(
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value))), 16);
    // nothing is left out of an infinity
    const __mmask16 finite = ~_mm512_fpclass_ps_mask(_mm512_castsi512_ps(high), 0x18);
    const __m512 rest = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(high));
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest)));
    _mm512_mask_storeu_epi32(lanes + i, some, _mm512_or_si512(high, low));
  }
#endif
}

// dst[k / 2, width] of pairs of what is nearest to sums[k, width] in bfloat16, which is taken off sums
inline void take_row_pairs(float* dst, float* sums, int64_t width, int64_t k) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  const auto take = [](float* from) {
    const __m512 value = _mm512_loadu_ps(from);
    const __m512i near =
        _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    const __m512 taken = _mm512_castsi512_ps(_mm512_slli_epi32(near, 16));
    const __mmask16 finite = ~_mm512_fpclass_ps_mask(taken, 0x18);
    _mm512_storeu_ps(from, _mm512_maskz_sub_ps(finite, value, taken));
    return near;
  };
  for (int64_t j = 0; j < k; j += 2)
    for (int64_t c = 0; c < width; c += 16) {
      const __m512i even = take(sums + j * width + c), odd = take(sums + (j + 1) * width + c);
      _mm512_storeu_si512(dst + j / 2 * width + c,
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
#endif
}

// the other side of split_pairs: float32 lanes that hold a bfloat16 hold it twice
inline void twice(float* lanes, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, lanes + i, sizeof(bits));
    bits |= bits >> 16;
    std::memcpy(lanes + i, &bits, sizeof(bits));
  }
}

// dst[(k + 1) / 2, width] of pairs (src[2 k, c], src[2 k + 1, c]), zero beyond cols and k
inline void pack_row_pairs(float* dst, int64_t width, const at::BFloat16* src, int64_t ld,
                           int64_t cols, int64_t k) {
  auto* out = reinterpret_cast<at::BFloat16*>(dst);
  // rows are far apart: no core fetches the next ones by itself
  constexpr int64_t kAhead = 16;
  for (int64_t j = 0; j < k; j += 2, out += 2 * width) {
    const at::BFloat16 *even = src + j * ld, *odd = even + ld;
    if (j + kAhead + 1 < k) {
      __builtin_prefetch(even + kAhead * ld);
      __builtin_prefetch(odd + kAhead * ld);
    }
    int64_t c = 0;
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    for (; c < cols; c += 32)
      interleave(out + 2 * c, even + c, j + 1 < k ? odd + c : nullptr,
                 std::min<int64_t>(32, cols - c));
#endif
    for (; c < cols; ++c) {
      out[2 * c] = even[c];
      out[2 * c + 1] = j + 1 < k ? odd[c] : at::BFloat16(0);
    }
    std::fill(out + 2 * cols, out + 2 * width, at::BFloat16(0));
  }
}

// All panels of a [k, cols] operand, one after another, each [lanes of k, kPanel or kWidth].
// transposed: src is [cols, k]. kPairs: two values of k share a lane, k is even.
template <bool kPairs, typename scalar_t, typename acc_t>
void pack_panel(acc_t* dst, const scalar_t* src, bool transposed, int64_t k, int64_t cols,
                int64_t first, int64_t width) {
  const int64_t used = std::min(width, cols - first);
  if constexpr (kPairs) {
    if (transposed) {
      // a pair is 32 bits of a row: a transpose of float-sized lanes
      const auto* lanes = reinterpret_cast<const float*>(src);
      pack_transposed(dst, width, lanes + first * (k / 2), k / 2, used, k / 2);
    } else {
      pack_row_pairs(dst, width, src + first, cols, used, k);
    }
  } else if (transposed) {
    pack_transposed(dst, width, src + first * k, k, used, k);
  } else {
    pack_rows(dst, width, src + first, cols, used, k);
  }
}

// The right side of an update, [padded k, width]. kPairs: it meets split_pairs, so that each value
// is there twice, and lanes beyond k are 0.
template <bool kPairs, typename scalar_t, typename acc_t>
void pack_update(acc_t* dst, const scalar_t* src, bool transposed, int64_t k, int64_t cols,
                 int64_t first, int64_t width) {
  pack_panel<false>(dst, src, transposed, k, cols, first, width);
  if constexpr (kPairs) {
    twice(dst, k * width);
    std::fill(dst + k * width, dst + padded<acc_t>(k) * width, acc_t(0));
  }
}

}  // namespace lorakern
