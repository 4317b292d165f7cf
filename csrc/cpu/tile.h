// Register tiles: c[rows, cols] (+)= a b + a2 b2, both products in one accumulator.
//
// A tile is kTileRows x kPanel sums in registers. Its right operand is a panel: k rows of kPanel
// (or kWidth, for narrow panels) neighbouring lanes. A lane is one acc_t, or a pair of bfloat16
// that AVX512-BF16 multiplies and adds to one float32 sum.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../vec.h"
#include "amx.h"

namespace lorakern {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 14;
#elif defined(__aarch64__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// whether pairs are multiplied in AMX tiles
inline bool has_tiles() {
#if defined(LORAKERN_AMX)
  return amx::ready();
#else
  return false;
#endif
}

// rows that fill the registers of a product, in pairs or not
template <bool kPairs>
#if defined(LORAKERN_AMX)
constexpr int kHeight = kPairs ? 2 * amx::kSide : kTileRows;
#else
constexpr int kHeight = kTileRows;
#endif

template <typename scalar_t>
constexpr bool kPairsOf = kHasPairs && std::is_same_v<scalar_t, at::BFloat16>;

template <typename acc_t>
constexpr int kWidth = at::vec::Vectorized<acc_t>::size();
template <typename acc_t>
constexpr int kPanel = 2 * kWidth<acc_t>;

// lanes an operand of `cols` columns takes: the last panel may be a narrow one
template <typename acc_t>
inline int64_t padded(int64_t cols) {
  return (cols + kWidth<acc_t> - 1) / kWidth<acc_t> * kWidth<acc_t>;
}

// lanes of the first panel of as many columns
template <typename acc_t>
inline int64_t width_of(int64_t cols) {
  return cols > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>;
}

// One product: a[rows, k] b[k, cols] in lanes. Rows of a are `lda` apart and its k neighbours, or
// the other way round in a column-major tile.
template <typename acc_t>
struct Term {
  const acc_t* a = nullptr;
  int64_t lda = 0;
  const acc_t* b = nullptr;
  int64_t ldb = 0;
  int64_t k = 0;
};

// A panel is gone through in runs of k that stay in L1 for all rows. They also keep long sums exact:
// in float32 they are as short as plain torch's on AMD's cores, half as long as on Intel's.
template <typename acc_t, bool kPairs = false>
constexpr int64_t kRun = kPairs ? 384 : sizeof(acc_t) == 4 ? 192 : 256;
// Where plain torch has short runs too: in a narrow panel, which is the down product of a small rank
// whose error the up product spreads, and in a product of one row. Also the longest update that is
// summed onto a product's own run.
constexpr int64_t kShortRun = 16;

template <bool kPairs, typename acc_t>
inline at::vec::Vectorized<acc_t> multiply_add(at::vec::Vectorized<acc_t> a,
                                               at::vec::Vectorized<acc_t> b,
                                               at::vec::Vectorized<acc_t> sum) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  if constexpr (kPairs) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(static_cast<__m512>(a)),
                            reinterpret_cast<__m512bh>(static_cast<__m512>(b)));
  }
#endif
  return at::vec::fmadd(a, b, sum);
}

template <typename acc_t, int kRows, int kVecs, bool kPairs, bool kColumnMajor>
inline void accumulate(at::vec::Vectorized<acc_t> (&sums)[kRows][kVecs], const Term<acc_t>& term) {
  using Vec = at::vec::Vectorized<acc_t>;
  const acc_t *a = term.a, *b = term.b;
  const int64_t lda = term.lda, ldb = term.ldb;
#pragma GCC unroll 4
  for (int64_t k = 0; k < term.k; ++k) {
    Vec right[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) right[j] = Vec::loadu(b + k * ldb + j * kWidth<acc_t>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      acc_t lane;
      std::memcpy(&lane, a + (kColumnMajor ? k * lda + i : i * lda + k), sizeof(lane));
      const Vec left(lane);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j)
        sums[i][j] = multiply_add<kPairs, acc_t>(left, right[j], sums[i][j]);
    }
  }
}

// The same in runs of k, each of whose sums is added to those before. Rounding grows with the root of
// a run's length and of the number of runs.
template <typename acc_t, int kRows, bool kPairs, bool kColumnMajor>
inline void accumulate_runs(at::vec::Vectorized<acc_t> (&sums)[kRows][1], const Term<acc_t>& term) {
  using Vec = at::vec::Vectorized<acc_t>;
  for (int64_t k = 0; k < term.k; k += kShortRun) {
    Vec run[kRows][1];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) run[i][0] = Vec(acc_t(0));
    const Term<acc_t> part{term.a + (kColumnMajor ? k * term.lda : k), term.lda,
                           term.b + k * term.ldb, term.ldb, std::min(kShortRun, term.k - k)};
    accumulate<acc_t, kRows, 1, kPairs, kColumnMajor>(run, part);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][0] + run[i][0];
  }
}

template <typename acc_t, int kRows, int kVecs, bool kPairs, bool kColumnMajor>
void tile(acc_t* c, int64_t ldc, bool add, const Term<acc_t>& first, const Term<acc_t>& second) {
  using Vec = at::vec::Vectorized<acc_t>;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums[i][j] = Vec(acc_t(0));
  }
  if constexpr (kVecs == 1) {
    accumulate_runs<acc_t, kRows, kPairs, kColumnMajor>(sums, first);
  } else {
    accumulate<acc_t, kRows, kVecs, kPairs, kColumnMajor>(sums, first);
  }
  if (second.k > 0) accumulate<acc_t, kRows, kVecs, kPairs, kColumnMajor>(sums, second);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      acc_t* out = c + i * ldc + j * kWidth<acc_t>;
      (add ? sums[i][j] + Vec::loadu(out) : sums[i][j]).store(out);
    }
  }
}

template <typename acc_t>
using TileFn = void (*)(acc_t*, int64_t, bool, const Term<acc_t>&, const Term<acc_t>&);

template <typename acc_t, int kVecs, bool kPairs, bool kColumnMajor, int... kRows>
constexpr std::array<TileFn<acc_t>, sizeof...(kRows)> tiles_of(
    std::integer_sequence<int, kRows...>) {
  return {tile<acc_t, kRows + 1, kVecs, kPairs, kColumnMajor>...};
}

// c[rows, cols] of one panel, in tiles of nearly equal height. `wide`: kPanel columns, else kWidth.
template <typename acc_t, bool kPairs, bool kColumnMajor>
void multiply_panel(acc_t* c, int64_t ldc, bool add, int64_t rows, bool wide, Term<acc_t> first,
                    Term<acc_t> second = {}) {
#if defined(LORAKERN_AMX)
  if constexpr (kPairs) {
    if (amx::ready())
      return amx::multiply_panel<kColumnMajor>(c, ldc, add, rows, wide, first, second);
  }
#endif
  using Heights = std::make_integer_sequence<int, kTileRows>;
  static constexpr auto kNarrow = tiles_of<acc_t, 1, kPairs, kColumnMajor>(Heights{});
  static constexpr auto kWide = tiles_of<acc_t, 2, kPairs, kColumnMajor>(Heights{});
  const int64_t count = (rows + kTileRows - 1) / kTileRows;
  const auto run = [&](Term<acc_t> part, Term<acc_t> extra) {
    for (int64_t t = 0, row = 0; t < count; ++t) {
      const int64_t height = rows / count + (t < rows % count);
      (wide ? kWide : kNarrow)[height - 1](c + row * ldc, ldc, add, part, extra);
      row += height;
      part.a += kColumnMajor ? height : height * part.lda;
      extra.a += kColumnMajor ? height : height * extra.lda;
    }
    add = true;
  };
  // one row is plain torch's dot product, whose lanes are short runs
  const int64_t most = rows == 1 ? kShortRun : kRun<acc_t, kPairs>;
  const auto in_runs = [&](const Term<acc_t>& term, const Term<acc_t>& extra) {
    const int64_t runs = std::max<int64_t>(1, (term.k + most - 1) / most);
    const int64_t length = (term.k + runs - 1) / runs;
    for (int64_t i = 0, from = 0; i < runs; ++i, from += length)
      run({term.a + (kColumnMajor ? from * term.lda : from), term.lda, term.b + from * term.ldb,
           term.ldb, std::min(length, term.k - from)},
          i + 1 == runs ? extra : Term<acc_t>{});
  };
  // a long update has runs of its own, or each of its terms would round the whole sum
  const bool apart = second.k > std::min(kShortRun, first.k);
  in_runs(first, apart ? Term<acc_t>{} : second);
  if (apart) in_runs(second, {});
}

}  // namespace lorakern
