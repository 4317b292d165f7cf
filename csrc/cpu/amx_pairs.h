// Operands of AMX products that are made for them: a left one turned, a right one in two parts.

#pragma once

#include "amx.h"
#include "pack.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

// dst[cols, (k + 1) / 2] of pairs (src[2 k, c], src[2 k + 1, c]), up to whole squares of 16 by 16 lanes
// with zeros
inline void pack_turned_pairs(float* dst, int64_t ld, const at::BFloat16* src, int64_t src_ld,
                              int64_t cols, int64_t k) {
  constexpr int64_t kSide = 16, kWidth = 2 * kSide;
  alignas(64) float pairs[kSide * kWidth];
  for (int64_t j = 0; j < k; j += 2 * kSide) {
    const int64_t depth = std::min(2 * kSide, k - j);
    std::fill(pairs + (depth + 1) / 2 * kWidth, pairs + kSide * kWidth, 0.0f);
    for (int64_t c = 0; c < cols; c += kWidth) {
      const int64_t used = std::min(kWidth, cols - c);
      pack_row_pairs(pairs, kWidth, src + j * src_ld + c, src_ld, used, depth);
      for (int64_t half = 0; half < used; half += kSide)
        at::vec::transpose_mxn<float, kSide, kSide>(pairs + half, kWidth,
                                                    dst + (c + half) * ld + j / 2, ld);
    }
  }
}

namespace amx {

// c[rows, 32 if wide, else 16] (+)= a (b + b'), where b' is what b leaves out of a wider operand:
// after each 16 lanes of b come those of b', the last ones filled up with zeros. Four tiles of a and
// b are loaded for four products, but of a and both parts six for eight.
template <bool kTall, bool kWide>
void tiles_of_parts(float* c, int64_t ldc, bool add, int upper, int lower, const float* a,
                    int64_t lda, const float* b, int64_t ldb, int64_t k) {
  load_sums<kTall, kWide>(c, ldc, add);
  for (int64_t from = 0; from < k; from += kSide, b += 2 * kSide * ldb) {
    const int64_t lanes = std::min<int64_t>(kSide, k - from);
    step<false, kTall, kWide>(upper, lower, a + from, lda, b, ldb, lanes);
    _tile_loadd(6, b + kSide * ldb, ldb * 4);
    if constexpr (kWide) _tile_loadd(7, b + kSide * ldb + kSide, ldb * 4);
    multiply_tiles<kTall, kWide>();
  }
  store_sums<kTall, kWide>(c, ldc);
}

template <typename Term>
void multiply_parts(float* c, int64_t ldc, bool add, int64_t rows, bool wide, const Term& term) {
  Shapes shapes;
  written();
  for (int64_t row = 0; row < rows; row += 2 * kSide) {
    const int upper = static_cast<int>(std::min<int64_t>(kSide, rows - row));
    const int lower = static_cast<int>(std::clamp<int64_t>(rows - row - kSide, 0, kSide));
    shapes.set(upper, lower);
    const auto run = lower  ? wide ? tiles_of_parts<true, true> : tiles_of_parts<true, false>
                     : wide ? tiles_of_parts<false, true>
                            : tiles_of_parts<false, false>;
    run(c + row * ldc, ldc, add, upper, lower, term.a + row * term.lda, term.lda, term.b, term.ldb,
        term.k);
  }
}

}  // namespace amx

}  // namespace lorakern

#endif
