// decoupled_attention of bfloat16 in AMX tiles, on machines that have them: queries stand in columns.
//
// s[T, 32] = k qᵀ for a block of 32 queries. A softmax then goes down the rows, with 16 queries in a
// vector and nothing to add up across one, and two rows of p are the pairs that the right side of
// outᵀ[d, 32] = vᵀ p wants. p is not rounded to bfloat16: its highest 8 bits and the 8 after them
// are two terms of one sum, and stand where p stood. All operands are filled up with zeros to whole
// tiles, once a head.

#pragma once

#include "decoupled_attention.h"

#if defined(LORAKERN_AMX)

namespace lorakern::amx {

// queries of a block
constexpr int64_t kBlock = 2 * kSide;

inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// 2^t, off by 3e-6 of it at most: a minimax of its part between two whole numbers
inline __m512 power_of_two(__m512 t) {
  constexpr int kFloor = 0x09;
  const __m512 part = _mm512_reduce_ps(t, kFloor);
  __m512 sum = _mm512_set1_ps(0.013534168f);
  for (const float c : {0.05201146f, 0.24144276f, 0.69300383f, 1.0000026f})
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

// to[rows, lanes] of pairs of channels = from[count, d], zero beyond
inline void copy_rows(float* to, int64_t lanes, const at::BFloat16* from, int64_t ld, int64_t count,
                      int64_t d, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < 2 * lanes; c += 32) {
      const int64_t n = i < count ? std::clamp<int64_t>(d - c, 0, 32) : 0;
      const auto some = static_cast<__mmask32>((uint64_t(1) << n) - 1);
      const auto* at = n > 0 ? from + i * ld + c : from;
      _mm512_storeu_si512(to + i * lanes + c / 2, _mm512_maskz_loadu_epi16(some, at));
    }
  }
}

// out[count, d], ld apart, = columns[d, 32]ᵀ, rounded once
inline void store_columns(at::BFloat16* out, int64_t ld, const float* columns, int64_t count,
                          int64_t d) {
  alignas(64) float square[kSide * kSide];
  for (int64_t c = 0; c < d; c += 32) {
    const auto some = static_cast<__mmask32>((uint64_t(1) << std::min<int64_t>(32, d - c)) - 1);
    for (int64_t q = 0; q < count; q += kSide) {
      const float* from = columns + c * kBlock + q;
      for (int i = 0; i < kSide; ++i, from += 2 * kBlock) {
        const auto round = [](const float* x) {
          return _mm512_cvtepu16_epi32(
              reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x))));
        };
        _mm512_store_si512(square + i * kSide,
                           _mm512_or_si512(round(from),
                                           _mm512_slli_epi32(round(from + kBlock), 16)));
      }
      at::vec::transpose_mxn<float, kSide, kSide>(square, kSide, square, kSide);
      for (int64_t i = 0; i < std::min<int64_t>(kSide, count - q); ++i)
        _mm512_mask_storeu_epi16(out + (q + i) * ld + c, some,
                                 _mm512_load_si512(square + i * kSide));
    }
  }
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
  for (int h = 0; h < kHalves; ++h) most[h] = _mm512_max_ps(top[h], top[kHalves + h]) * scale;
  each([&](int i, int64_t t, int half) {
    const __m512 e = power_of_two(_mm512_fmsub_ps(load(s, t, half), scale, most[half]));
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

// What a thread holds of one head and one block of queries.
class Columns {
 public:
  using scalar_t = at::BFloat16;
  static constexpr int64_t kTall = kSide, kMost = kBlock;

 protected:
  using Operand = Attention<scalar_t>::Operand;

  explicit Columns(const Attention<scalar_t>& given)
      : p(given), tokens(p.place(2)), lanes(whole(p.d, 2 * kSide) / 2),
        depth(whole(tokens, 2 * kSide) / 2) {}

  // room[tokens, lanes] = an operand's rows of channels
  void pack(float* to, Operand operand, int64_t b, int64_t h) const {
    for (const auto& g : p.groups)
      copy_rows(to + g.first * lanes, lanes, g.*operand + b * g.T * p.C + h * p.d, p.C, g.T, p.d,
                whole(g.T, 2));
  }

  // turned[dp, depth] = an operand's pairs of tokens; room is as large
  void pack_turned(float* turned, float* room, Operand operand, int64_t b, int64_t h) const {
    std::fill(room + tokens / 2 * p.dp, room + depth * p.dp, 0.0f);
    for (const auto& g : p.groups)
      pack_row_pairs(room + g.first / 2 * p.dp, p.dp, g.*operand + b * g.T * p.C + h * p.d, p.C,
                     p.d, g.T);
    pack_transposed(turned, depth, room, p.dp, depth, p.dp);
  }

  // rows[32, lanes] = x[count, d], zero beyond, and columns[lanes, 32]
  void stand(float* columns, float* rows, const scalar_t* x, int64_t count) const {
    copy_rows(rows, lanes, x, p.C, count, p.d, kBlock);
    pack_transposed(columns, kBlock, rows, lanes, kBlock, lanes);
  }

  // s[tokens, count] = keys[tokens, lanes] columns[lanes, count]
  void scores(float* s, const float* keys, const float* columns, int64_t count) const {
    multiply_panel<false>(s, kBlock, false, tokens, count > kSide,
                          Term<float>{keys, lanes, columns, kBlock, lanes}, Term<float>{});
  }

  // out[count, d], C apart, = (turned[dp, depth] s[2 depth, count])ᵀ, s in pairs of rows
  void weigh(scalar_t* out, float* room, const float* turned, const float* s, int64_t count) const {
    multiply_panel<false>(room, kBlock, false, p.d, count > kSide,
                          Term<float>{turned, depth, s, 2 * kBlock, depth},
                          Term<float>{turned, depth, s + kBlock, 2 * kBlock, depth});
    store_columns(out, p.C, room, count, p.d);
  }

  template <bool kBackward>
  void softmax_all(float* s, float* dp, float* ds_rows, int64_t b, int64_t row,
                   int64_t count) const {
    for (const auto& g : p.groups) {
      const int64_t T = whole(g.T, 2), at = g.first * kBlock;
      // a row between groups has no share
      if (T > g.T)
        std::fill_n(s + at + g.T * kBlock, kBlock, -std::numeric_limits<float>::infinity());
      alignas(64) float weight[kBlock] = {};
      for (int64_t i = 0; i < count; ++i) weight[i] = g.weight(b, row + i);
      const __m512 weights[2] = {_mm512_load_ps(weight), _mm512_load_ps(weight + kSide)};
      (count > kSide ? softmax<2, kBackward> : softmax<1, kBackward>)(
          s + at, dp + at, kBackward && g.wanted ? ds_rows + at : nullptr, T, p.factor, weights);
    }
  }

  Attention<scalar_t> p;
  int64_t tokens, lanes, depth;
};

class ForwardColumns : Columns {
 public:
  using Columns::kMost, Columns::kTall;

  ForwardColumns(const Attention<scalar_t>& given, int64_t)
      : Columns(given), scratch(tokens * lanes + 2 * p.dp * depth + 2 * lanes * kBlock +
                                2 * depth * kBlock + 2 * lanes * kBlock) {
    std::fill_n(s, 2 * depth * kBlock, 0.0f);
  }

  void head(int64_t b, int64_t h) {
    pack(keys, &Group<scalar_t>::k, b, h);
    pack_turned(values, room, &Group<scalar_t>::v, b, h);
  }

  void block(scalar_t* out, int64_t b, int64_t h, int64_t row, int64_t count) {
    const int64_t at = (b * p.Q + row) * p.C + h * p.d;
    stand(columns, rows, p.q + at, count);
    scores(s, keys, columns, count);
    softmax_all<false>(s, s, nullptr, b, row, count);
    weigh(out + at, sums, values, s, count);
  }

 private:
  Scratch<float> scratch;
  float* const keys = scratch.take(tokens * lanes);
  float* const values = scratch.take(p.dp * depth);
  float* const room = scratch.take(p.dp * depth);
  float* const rows = scratch.take(lanes * kBlock);
  float* const columns = scratch.take(lanes * kBlock);
  float* const s = scratch.take(2 * depth * kBlock);
  float* const sums = scratch.take(2 * lanes * kBlock);
};

}  // namespace lorakern::amx

#endif
