// Softmax of attention_columns.h: down rows of scores in which queries stand side by side.

#pragma once

#include <array>
#include <limits>

#include "amx.h"

#if defined(LORAKERN_AMX)

namespace lorakern::amx {

// queries of a block
constexpr int64_t kBlock = 2 * kSide;

// 2^t, off by 3e-6 of it at most, exact for whole t: a minimax between two of them
inline __m512 power_of_two(__m512 t) {
  constexpr int kFloor = 0x09;
  const __m512 part = _mm512_reduce_ps(t, kFloor);
  __m512 sum = _mm512_set1_ps(0.013426686f);
  for (const float c : {0.052242473f, 0.2412802f, 0.69304484f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(c));
  return _mm512_scalef_ps(sum, t);
}

// float32 cut after the bits that bfloat16 has
inline __m512 cut(__m512 x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(~0xffff)));
}

// pairs of bfloat16: the first cut, then the second
inline __m512 pairs_of(__m512 first, __m512 second) {
  // a | (b & c)
  constexpr int kOrAnd = 0xf8;
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second),
      _mm512_set1_epi32(~0xffff), kOrAnd));
}

// 32 neighbours in bfloat16, cut
inline __m512 neighbours(__m512 first, __m512 second) {
  alignas(64) static constexpr auto kHigh = [] {
    std::array<int16_t, 32> order{};
    for (int16_t i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(2 * i + 1);
    return order;
  }();
  return _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(first),
                                                       _mm512_load_si512(kHigh.data()),
                                                       _mm512_castps_si512(second)));
}

// two rows of s of 16 queries become their pairs, and the pairs of what these leave out
inline void store_pairs(float* at, __m512 even, __m512 odd) {
  _mm512_storeu_ps(at, pairs_of(even, odd));
  _mm512_storeu_ps(at + kBlock, pairs_of(even - cut(even), odd - cut(odd)));
}

// 32 queries of one row: in bfloat16, and what that leaves out
inline void store_row(float* at, __m512 first, __m512 second) {
  _mm512_storeu_ps(at, neighbours(first, second));
  _mm512_storeu_ps(at + kSide, neighbours(first - cut(first), second - cut(second)));
}

// Rows of s of one group, an even number T of them, for 16 or 32 queries. They become
// weight * p, p = softmax(factor * s), in pairs of rows. kBackward: dp[T], the gradient of p before
// the weight, becomes that of s in pairs of rows, and s becomes rows. ds_rows: the gradient in rows
// too, or null where neither rows are wanted.
template <int kHalves, bool kBackward>
void softmax(float* s, float* dp, float* ds_rows, int64_t T, float factor,
             const __m512 (&weight)[2]) {
  const auto load = [](const float* from, int64_t t, int half) {
    return _mm512_loadu_ps(from + t * kBlock + half * kSide);
  };
  // two rows at once, for as many chains of sums
  const auto each = [&](const auto& visit) {
    for (int64_t t = 0; t < T; t += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kHalves; ++i) visit(i, t + i / kHalves, i % kHalves);
    }
  };
  __m512 top[2 * kHalves], sum[2 * kHalves], dot[2 * kHalves];
  for (int i = 0; i < 2 * kHalves; ++i) {
    top[i] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    sum[i] = dot[i] = _mm512_setzero_ps();
  }
  each([&](int i, int64_t t, int half) { top[i] = _mm512_max_ps(load(s, t, half), top[i]); });
  const __m512 by_factor = _mm512_set1_ps(factor);
  const __m512 scale = by_factor * _mm512_set1_ps(1.44269504f);
  __m512 most[kHalves], by[kHalves], mean[kHalves];
  for (int h = 0; h < kHalves; ++h) most[h] = _mm512_max_ps(top[h], top[kHalves + h]);
  each([&](int i, int64_t t, int half) {
    const __m512 e = power_of_two((load(s, t, half) - most[half]) * scale);
    _mm512_storeu_ps(s + t * kBlock + half * kSide, e);
    sum[i] += e;
    if constexpr (kBackward) dot[i] += e * load(dp, t, half);
  });
  for (int h = 0; h < kHalves; ++h) {
    const __m512 share = _mm512_set1_ps(1) / (sum[h] + sum[kHalves + h]);
    by[h] = weight[h] * share;
    mean[h] = (dot[h] + dot[kHalves + h]) * share;
  }
  for (int64_t t = 0; t < T; t += 2) {
    __m512 p[2][2] = {}, ds[2][2] = {};
    for (int h = 0; h < kHalves; ++h) {
      for (int i = 0; i < 2; ++i) {
        p[i][h] = load(s, t + i, h) * by[h];
        if constexpr (kBackward) ds[i][h] = (load(dp, t + i, h) - mean[h]) * p[i][h] * by_factor;
      }
      if constexpr (kBackward) {
        store_pairs(dp + t * kBlock + h * kSide, ds[0][h], ds[1][h]);
      } else {
        store_pairs(s + t * kBlock + h * kSide, p[0][h], p[1][h]);
      }
    }
    if (!kBackward || !ds_rows) continue;
    for (int i = 0; i < 2; ++i) {
      store_row(s + (t + i) * kBlock, p[i][0], p[i][1]);
      store_row(ds_rows + (t + i) * kBlock, ds[i][0], ds[i][1]);
    }
  }
}

}  // namespace lorakern::amx

#endif
