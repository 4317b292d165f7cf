// Dot products of long rows with long rows, in vectors.

#pragma once

#include "tile.h"

namespace lorakern {

// sums[rows, cols] += left[rows, n] right[cols, n]ᵀ, lane by lane: each is a vector
template <typename acc_t>
void add_dots(acc_t* sums, const acc_t* left, int64_t rows, const acc_t* right, int64_t cols,
              int64_t ld, int64_t n) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  constexpr int kHigh = 4, kAcross = kTileRows > 6 ? 4 : 2;
  for (int64_t i0 = 0; i0 < rows; i0 += kHigh) {
    for (int64_t j0 = 0; j0 < cols; j0 += kAcross) {
      // past the last row or column, it is the last once more
      const acc_t *a[kHigh], *b[kAcross];
      acc_t* to[kHigh][kAcross];
      Vec dots[kHigh][kAcross];
      for (int j = 0; j < kAcross; ++j) b[j] = right + std::min(j0 + j, cols - 1) * ld;
#pragma GCC unroll 4
      for (int i = 0; i < kHigh; ++i) {
        const int64_t row = std::min(i0 + i, rows - 1);
        a[i] = left + row * ld;
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j) {
          to[i][j] = sums + (row * cols + std::min(j0 + j, cols - 1)) * kLanes;
          dots[i][j] = Vec(acc_t(0));
        }
      }
      const auto step = [&](int64_t k, const auto& load) {
        Vec across[kAcross];
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j) across[j] = load(b[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < kHigh; ++i) {
          const Vec high = load(a[i] + k);
#pragma GCC unroll 4
          for (int j = 0; j < kAcross; ++j) dots[i][j] = at::vec::fmadd(high, across[j], dots[i][j]);
        }
      };
      int64_t k = 0;
      for (; k + kLanes <= n; k += kLanes) step(k, [](const acc_t* v) { return Vec::loadu(v); });
      if (k < n) step(k, [&](const acc_t* v) { return Vec::loadu(v, n - k); });
      // all are read before one is written: the last may be there more than once
#pragma GCC unroll 4
      for (int i = 0; i < kHigh; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j) dots[i][j] = dots[i][j] + Vec::loadu(to[i][j]);
#pragma GCC unroll 4
      for (int i = 0; i < kHigh; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kAcross; ++j) dots[i][j].store(to[i][j]);
    }
  }
}

}  // namespace lorakern
