// Products with bfloat16 factors of a Kronecker update in AMX tiles, for a run of rows at a time: a
// row of x is a [B, Q] matrix, and rows (m, b) of a run lie one after another.
//
// A matrix of sums is kept in stripes of 16 columns, [stripe][row][16]: a tile of it is 16 lines of
// cache, and its rows become the pairs of a right operand where they are. Tiles at an edge share
// rows or columns with their neighbours, so that all of a product have one shape.

#pragma once

#include "kron.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

// n rows or columns in tiles
struct Cut {
  int64_t n, side, count;
  explicit Cut(int64_t n)
      : n(n), side(std::min<int64_t>(n, amx::kSide)), count((n + amx::kSide - 1) / amx::kSide) {}
  int64_t at(int64_t i) const { return std::min(i * side, n - side); }
};

// the lanes of a sum in steps of one length
struct Steps {
  int64_t length, count;
  explicit Steps(int64_t lanes) : length(std::min<int64_t>(lanes, amx::kSide)) {
    while (lanes % length != 0) --length;
    count = lanes / length;
  }
};

// A sum over `runs` of `steps` of lanes: the bytes from a row of a left tile to the next, and the
// floats from an operand's tile to that of the next run and of the next step.
struct Sum {
  int64_t runs, steps, lda, left_run, left_step, right_run, right_step;
};

// tiles c (+)= left right, two by two or fewer: a right tile has its rows side by side
template <bool kTall, bool kWide>
inline void tile_sums(const std::array<float*, 4>& c, int64_t ldc, bool add, const Sum& sum,
                      const std::array<const float*, 2>& left,
                      const std::array<const float*, 2>& right) {
  if (add) {
    _tile_loadd(0, c[0], ldc);
    if constexpr (kWide) _tile_loadd(1, c[1], ldc);
    if constexpr (kTall) _tile_loadd(2, c[2], ldc);
    if constexpr (kTall && kWide) _tile_loadd(3, c[3], ldc);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
  for (int64_t m = 0; m < sum.runs; ++m) {
    int64_t a = m * sum.left_run, b = m * sum.right_run;
    for (int64_t k = 0; k < sum.steps; ++k, a += sum.left_step, b += sum.right_step) {
      _tile_loadd(4, left[0] + a, sum.lda);
      _tile_loadd(6, right[0] + b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kWide) {
        _tile_loadd(7, right[1] + b, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTall) {
        _tile_loadd(5, left[1] + a, sum.lda);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c[0], ldc);
  if constexpr (kWide) _tile_stored(1, c[1], ldc);
  if constexpr (kTall) _tile_stored(2, c[2], ldc);
  if constexpr (kTall && kWide) _tile_stored(3, c[3], ldc);
}

// out(i, j) (+)= left(i) right(j) for tiles i < rows and j < cols, each where its first float is;
// ldc: bytes from a row of out to the next
template <typename Left, typename Right, typename Out>
inline void multiply_tiles(int64_t rows, int64_t cols, const Sum& sum, bool add, const Left& left,
                           const Right& right, int64_t ldc, const Out& out) {
  amx::written();
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < cols; j += 2) {
      const int64_t low = std::min(i + 1, rows - 1), next = std::min(j + 1, cols - 1);
      const std::array c{out(i, j), out(i, next), out(low, j), out(low, next)};
      const std::array<const float*, 2> a{left(i), left(low)}, b{right(j), right(next)};
      const auto run = low > i ? next > j ? tile_sums<true, true> : tile_sums<true, false>
                       : next > j ? tile_sums<false, true>
                                  : tile_sums<false, false>;
      run(c, ldc, add, sum, a, b);
    }
  amx::written();
}

// the pairs of two rows of 16 values, [even | odd]
inline __m512i interleaved(__m512i rows) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int16_t i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i / 2 + 16 * (i % 2));
    return order;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), rows);
}

// s times sums[rows, 16] as pairs [rows / 2, 16], in its place
inline void pair_sums(float* sums, int64_t rows, float s) {
  const __m512 by = _mm512_set1_ps(s);
  for (int64_t i = 0; i < rows / 2; ++i) {
    const __m512 even = _mm512_load_ps(sums + 32 * i), odd = _mm512_load_ps(sums + 32 * i + 16);
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, by), _mm512_mul_ps(even, by));
    _mm512_store_si512(sums + 16 * i, interleaved(reinterpret_cast<__m512i>(both)));
  }
}

// pairs [rows / 2, 16] of `used` columns of rows that are ld apart, zero beyond them
inline void pair_rows(float* pairs, const at::BFloat16* from, int64_t ld, int64_t rows,
                      int64_t used) {
  const auto some = static_cast<__mmask16>((1u << used) - 1);
  for (int64_t i = 0; i < rows / 2; ++i, from += 2 * ld) {
    const __m256i even = _mm256_maskz_loadu_epi16(some, from),
                  odd = _mm256_maskz_loadu_epi16(some, from + ld);
    _mm512_store_si512(pairs + 16 * i,
                       interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)));
  }
}

// to[8 pairs of columns, 16 rows] of sums[16 rows, 16], of which `lanes` pairs are wanted
inline void turn_sums(float* to, const float* sums, int64_t lanes) {
  __m512 a[8], b[8];
  // rows i and i + 8 in the halves: each half is turned for itself
  for (int i = 0; i < 8; ++i)
    a[i] = reinterpret_cast<__m512>(
        _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16 * (i + 8)), _mm512_load_ps(sums + 16 * i)));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
  __m512d c[8];
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      c[i + 2 * j] = _mm512_unpacklo_pd(pd(b[i + j]), pd(b[i + 2 + j]));
      c[i + 2 * j + 1] = _mm512_unpackhi_pd(pd(b[i + j]), pd(b[i + 2 + j]));
    }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  __m512d out[8];
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_permutex2var_pd(c[i], first, c[i + 4]);
    out[i + 4] = _mm512_permutex2var_pd(c[i], second, c[i + 4]);
  }
  for (int i = 0; i < 8; ++i)
    if (i < lanes) _mm512_store_ps(to + 16 * i, _mm512_castpd_ps(out[i]));
}

// left[16 or fewer, 16] of pairs: the columns of up to 32 rows, ld apart, zero beyond them
inline void turn_rows(float* left, const at::BFloat16* from, int64_t ld, int64_t rows,
                      int64_t columns) {
  alignas(64) float pairs[256];
  pair_rows(pairs, from, ld, rows, columns);
  amx::turn(left, pairs, amx::kSide, amx::kSide, rows / 2);
}

// C [A, B] and D [P, Q] as operands: y = s·C (X Dᵀ), or of the turned factors dx.
struct KronTiles {
  int64_t A, B, P, Q;
  // rows and columns of y, lanes of the sums over B and over Q
  Cut rows, cols;
  Steps outer, inner;
  // C in tiles [rows][outer][16, 16]; Dᵀ in stripes of pairs
  at::Tensor c, d;

  // of contiguous bfloat16 matrices with even sides
  KronTiles(const at::Tensor& C, const at::Tensor& D)
      : A(C.size(0)), B(C.size(1)), P(D.size(0)), Q(D.size(1)), rows(A), cols(P), outer(B / 2),
        inner(Q / 2),
        c(scratch<float>(rows.count * outer.count * 256, C.options()).zero_()),
        d(scratch<float>(cols.count * Q / 2 * 16, C.options())) {
    const auto lanes = [](const at::Tensor& t) {
      return reinterpret_cast<const float*>(t.const_data_ptr<at::BFloat16>());
    };
    auto* const to = c.mutable_data_ptr<float>();
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < outer.count; ++k)
        amx::copy_lanes(to + (i * outer.count + k) * 256, 16,
                        lanes(C) + rows.at(i) * B / 2 + k * outer.length, B / 2, rows.side,
                        outer.length);
    for (int64_t j = 0; j < cols.count; ++j)
      pack_transposed(d.mutable_data_ptr<float>() + j * Q / 2 * 16, 16,
                      lanes(D) + cols.at(j) * Q / 2, Q / 2, cols.side, Q / 2);
  }

  // h in stripes [count·B, P] = X Dᵀ of `count` rows of x
  void by_d(amx::Shapes& shapes, float* h, const at::BFloat16* x, int64_t count) const {
    const Cut all(count * B);
    const auto* const lanes = reinterpret_cast<const float*>(x);
    const float* const right = d.const_data_ptr<float>();
    const int64_t depth = Q / 2;
    shapes.set(all.side, all.side, inner.length);
    multiply_tiles(
        all.count, cols.count, {1, inner.count, 4 * depth, 0, inner.length, 0, inner.length * 16},
        false, [=](int64_t i) { return lanes + all.at(i) * depth; },
        [=](int64_t j) { return right + j * depth * 16; }, 64,
        [=](int64_t i, int64_t j) { return h + (j * all.n + all.at(i)) * 16; });
  }

  // out(m, a, j), rows of ldc bytes, = C times the pairs of row m in stripe j, for the tile from row
  // a on and the `side` columns of a tile; pairs are in stripes of count·B rows
  template <typename Out>
  void by_c(amx::Shapes& shapes, const float* pairs, int64_t count, int64_t stripes, int64_t side,
            int64_t ldc, const Out& out) const {
    const float* const left = c.const_data_ptr<float>();
    const int64_t depth = B / 2, steps = outer.count, length = outer.length;
    const Cut rows = this->rows;
    shapes.set(rows.side, rows.side, length, side);
    for (int64_t m = 0; m < count; ++m)
      multiply_tiles(
          rows.count, stripes, {1, steps, 64, 0, 256, 0, length * 16}, false,
          [=](int64_t i) { return left + i * steps * 256; },
          [=](int64_t j) { return pairs + (j * count + m) * depth * 16; }, ldc,
          [=](int64_t i, int64_t j) { return out(m, rows.at(i), j); });
  }

  // out[count, ld] rows [A, P] = s·C H, with h's stripes of by_d, which become pairs
  void finish(amx::Shapes& shapes, float* out, int64_t ld, float* h, int64_t count, float s) const {
    pair_sums(h, cols.count * count * B, s);
    by_c(shapes, h, count, cols.count, cols.side, 4 * P,
         [=, P = P, cols = cols](int64_t m, int64_t a, int64_t j) {
           return out + m * ld + a * P + cols.at(j);
         });
  }
};

}  // namespace lorakern

#endif
