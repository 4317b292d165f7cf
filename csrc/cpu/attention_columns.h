// decoupled_attention of bfloat16 in AMX tiles, where a machine has them: queries in columns.
//
// s[T, 32] = k qᵀ for a block of 32 queries. A softmax then goes down the rows, with 16 queries in a
// vector and nothing to add up across one, and two rows of p are the pairs that the right side of
// outᵀ[d, 32] = vᵀ p wants. p is not rounded to bfloat16: its highest 8 bits and the 8 after them
// are two terms of one sum, and stand where p stood. All operands are filled up with zeros to whole
// tiles, once a head.

#pragma once

#include "column_softmax.h"
#include "decoupled_attention.h"

#if defined(LORAKERN_AMX)

namespace lorakern::amx {

inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

  // to[2 depth, lanes] = an operand's rows of channels
  void pack(float* to, Operand operand, int64_t b, int64_t h) const {
    std::fill(to + tokens * lanes, to + 2 * depth * lanes, 0.0f);
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

  // The next block's rows of x on their way: they lie far apart, where no hardware expects them.
  template <int kWrite>
  void expect(const scalar_t* x, int64_t row, int64_t count) const {
    const int64_t end = std::min(p.Q - row, count + kBlock);
    for (int64_t i = count; i < end; ++i) {
      for (int64_t c = 0; c < p.d + 31; c += 32)
        __builtin_prefetch(x + i * p.C + std::min(c, p.d - 1), kWrite, 2);
    }
  }

  // s[2 depth, count] = keys[2 depth, lanes] columns[lanes, count]
  void scores(float* s, const float* keys, const float* columns, int64_t count) {
    multiply_panel<false>(shapes, s, kBlock, false, 2 * depth, count > kSide,
                          Term<float>{keys, lanes, columns, kBlock, lanes}, Term<float>{});
  }

  // out[count, d], C apart, = (turned[dp, depth] s[2 depth, count])ᵀ, s in pairs of rows
  void weigh(scalar_t* out, float* room, const float* turned, const float* s, int64_t count) {
    multiply_panel<false>(shapes, room, kBlock, false, p.dp, count > kSide,
                          Term<float>{turned, depth, s, 2 * kBlock, depth},
                          Term<float>{turned, depth, s + kBlock, 2 * kBlock, depth});
    store_columns(out, p.C, room, count, p.d);
  }

  // sums[g.T, dp] += p[g.T, 32] x[32, dp], p in rows and x in pairs of rows
  void add_outer(float* sums, const float* rows, const float* pairs, const Group<scalar_t>& g) {
    const float* const from = rows + g.first * kBlock;
    for (int64_t j = 0; j < p.dp; j += kBlock)
      multiply_panel<false>(shapes, sums + j, p.dp, true, g.T, j + kBlock <= p.dp,
                            Term<float>{from, kBlock, pairs + j, p.dp, kSide},
                            Term<float>{from + kSide, kBlock, pairs + j, p.dp, kSide});
  }

  // pairs[16, dp] of rows[32, lanes]
  void pair_rows(float* pairs, const float* rows) const {
    pack_row_pairs(pairs, p.dp, reinterpret_cast<const scalar_t*>(rows), 2 * lanes, p.dp, kBlock);
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
  Shapes shapes;
};

class ForwardColumns : Columns {
 public:
  using Columns::kMost, Columns::kTall;

  ForwardColumns(const Attention<scalar_t>& given, int64_t)
      : Columns(given), scratch(2 * depth * lanes + 2 * p.dp * depth + 2 * lanes * kBlock +
                                2 * depth * kBlock + 2 * lanes * kBlock) {}

  void head(int64_t b, int64_t h) {
    pack(keys, &Group<scalar_t>::k, b, h);
    pack_turned(values, room, &Group<scalar_t>::v, b, h);
  }

  void block(scalar_t* out, int64_t b, int64_t h, int64_t row, int64_t count) {
    const int64_t at = (b * p.Q + row) * p.C + h * p.d;
    stand(columns, rows, p.q + at, count);
    expect<0>(p.q + at, row, count);
    scores(s, keys, columns, count);
    softmax_all<false>(s, s, nullptr, b, row, count);
    expect<1>(out + at, row, count);
    weigh(out + at, sums, values, s, count);
  }

 private:
  Scratch<float> scratch;
  float* const keys = scratch.take(2 * depth * lanes);
  float* const values = scratch.take(p.dp * depth);
  float* const room = scratch.take(p.dp * depth);
  float* const rows = scratch.take(lanes * kBlock);
  float* const columns = scratch.take(lanes * kBlock);
  float* const s = scratch.take(2 * depth * kBlock);
  float* const sums = scratch.take(2 * lanes * kBlock);
};

class BackwardColumns : Columns {
 public:
  using Columns::kMost, Columns::kTall;

  BackwardColumns(const Attention<scalar_t>& given, int64_t, bool need_dq)
      : Columns(given), need_dq(need_dq),
        scratch(4 * depth * lanes + 2 * p.dp * depth + 6 * lanes * kBlock + 6 * depth * kBlock +
                2 * kSide * p.dp) {}

  void head(int64_t b, int64_t h) {
    pack(keys, &Group<scalar_t>::k, b, h);
    pack(values, &Group<scalar_t>::v, b, h);
    if (need_dq) pack_turned(turned_keys, room, &Group<scalar_t>::k, b, h);
  }

  // dk and dv are added to sums[dk or dv, wanted token, dp]
  void block(const scalar_t* dout, scalar_t* dq, float* sums, int64_t b, int64_t h, int64_t row,
             int64_t count) {
    const int64_t at = (b * p.Q + row) * p.C + h * p.d;
    stand(columns, q_rows, p.q + at, count);
    expect<0>(p.q + at, row, count);
    scores(s, keys, columns, count);
    stand(columns, dout_rows, dout + at, count);
    expect<0>(dout + at, row, count);
    scores(ds, values, columns, count);
    softmax_all<true>(s, ds, ds_rows, b, row, count);
    if (need_dq) expect<1>(dq + at, row, count);
    if (need_dq) weigh(dq + at, dq_sums, turned_keys, ds, count);
    if (!p.wanted) return;
    pair_rows(q_pairs, q_rows);
    pair_rows(dout_pairs, dout_rows);
    for (const auto& g : p.groups) {
      if (!g.wanted) continue;
      float* const to = sums + g.sums * p.dp;
      add_outer(to, ds_rows, q_pairs, g);
      add_outer(to + p.wanted * p.dp, s, dout_pairs, g);
    }
  }

 private:
  const bool need_dq;
  Scratch<float> scratch;
  float* const keys = scratch.take(2 * depth * lanes);
  float* const values = scratch.take(2 * depth * lanes);
  float* const turned_keys = scratch.take(p.dp * depth);
  float* const room = scratch.take(p.dp * depth);
  float* const columns = scratch.take(lanes * kBlock);
  float* const q_rows = scratch.take(lanes * kBlock);
  float* const dout_rows = scratch.take(lanes * kBlock);
  float* const dq_sums = scratch.take(2 * lanes * kBlock);
  float* const s = scratch.take(2 * depth * kBlock);
  float* const ds = scratch.take(2 * depth * kBlock);
  float* const ds_rows = scratch.take(2 * depth * kBlock);
  float* const q_pairs = scratch.take(kSide * p.dp);
  float* const dout_pairs = scratch.take(kSide * p.dp);
};

}  // namespace lorakern::amx

#endif
