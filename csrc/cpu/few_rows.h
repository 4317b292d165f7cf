// out = a W of few rows in float32, W read once as it lies in memory. To copy a weight into panels
// takes longer than to multiply few rows by it.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "block.h"
#include "dots.h"

namespace lorakern {

// rows that are few, and multiply-adds worth a thread
constexpr int64_t kFewRows = 16;
constexpr int64_t kThread = 1 << 16;
// columns of a at hand, and of sums
constexpr int64_t kColumnBytes = 64 << 10;
constexpr int64_t kSumBytes = 24 << 10;

struct FewRows {
  int64_t M, K, N;
  const float *a, *w;
  // either may be null
  const float *bias, *start;
  float* out;
};

// out[M, N] = a[M, K] w[N, K]ᵀ + bias + start
inline void few_rows_transposed(const FewRows& p) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t kAcross = kTileRows > 6 ? 4 : 2;
  const int64_t some = kColumnBytes / sizeof(float) / p.M / Vec::size() * Vec::size();
  const int64_t depth = std::min(kDepth, some);
  at::parallel_for(0, p.N, std::max(kAcross, kThread / (p.M * p.K)), [&](int64_t b, int64_t e) {
    float sums[kFewRows * kAcross * Vec::size()];
    for (int64_t k = 0; k == 0 || k < p.K; k += depth) {
      const int64_t count = std::min(depth, p.K - k);
      for (int64_t n = b; n < e; n += kAcross) {
        const int64_t across = std::min(kAcross, e - n);
        std::fill(sums, sums + p.M * across * Vec::size(), 0.f);
        add_dots(sums, p.a + k, p.M, p.w + n * p.K + k, across, p.K, count);
        for (int64_t m = 0; m < p.M; ++m)
          for (int64_t j = 0; j < across; ++j) {
            float* const out = p.out + m * p.N + n + j;
            const Vec lanes = Vec::loadu(sums + (m * across + j) * Vec::size());
            const float sum = at::vec::vec_reduce_all<float>(
                [](const Vec& x, const Vec& y) { return x + y; }, lanes);
            const float before = k > 0 ? *out : p.start ? p.start[m * p.N + n + j] : 0.f;
            const bool last = k + depth >= p.K;
            *out = before + sum + (last && p.bias ? p.bias[n + j] : 0.f);
          }
      }
    }
  });
}

// sums[M, cols] (+)= a[kHigh, M]ᵀ w[kHigh, cols], with rows of w `ld` apart
template <int kHigh>
void add_few(float* sums, bool add, int64_t M, int64_t cols, const float* a, const float* w,
             int64_t ld) {
  using Vec = at::vec::Vectorized<float>;
  const auto columns = [&](int64_t j, const auto& load, const auto& store) {
    Vec rows[kHigh][2];
#pragma GCC unroll 4
    for (int k = 0; k < kHigh; ++k) load(rows[k], w + k * ld + j);
    for (int64_t m = 0; m < M; ++m) {
      float* const to = sums + m * cols + j;
      Vec sum[2] = {Vec(0.f), Vec(0.f)};
      if (add) load(sum, to);
#pragma GCC unroll 4
      for (int k = 0; k < kHigh; ++k) {
        const Vec x(a[k * M + m]);
        sum[0] = at::vec::fmadd(x, rows[k][0], sum[0]);
        sum[1] = at::vec::fmadd(x, rows[k][1], sum[1]);
      }
      store(to, sum);
    }
  };
  constexpr int64_t kBoth = 2 * Vec::size();
  int64_t j = 0;
  for (; j + kBoth <= cols; j += kBoth)
    columns(
        j,
        [](Vec* v, const float* from) {
          v[0] = Vec::loadu(from);
          v[1] = Vec::loadu(from + Vec::size());
        },
        [](float* to, const Vec* v) {
          v[0].store(to);
          v[1].store(to + Vec::size());
        });
  if (j == cols) return;
  const int64_t first = std::min<int64_t>(Vec::size(), cols - j), second = cols - j - first;
  columns(
      j,
      [&](Vec* v, const float* from) {
        v[0] = Vec::loadu(from, first);
        v[1] = second ? Vec::loadu(from + first, second) : Vec(0.f);
      },
      [&](float* to, const Vec* v) {
        v[0].store(to, first);
        if (second) v[1].store(to + first, second);
      });
}

// out[M, N] = a[M, K] w[K, N] + bias + start
inline void few_rows_plain(const FewRows& p) {
  constexpr int64_t kHigh = 4, kLong = kRun<float, false>, kBoth = kPanel<float>;
  const int64_t most =
      std::max(kBoth, kSumBytes / int64_t(sizeof(float)) / p.M / kBoth * kBoth);
  const int64_t grain = std::max<int64_t>(1, kThread / (p.M * p.K * most));
  at::parallel_for(0, (p.N + most - 1) / most, grain, [&](int64_t b, int64_t e) {
    std::vector<float> sums(p.M * most), a(kLong * p.M);
    for (int64_t j = b * most; j < std::min(p.N, e * most); j += most) {
      const int64_t cols = std::min(most, p.N - j);
      for (int64_t k0 = 0; k0 < p.K; k0 += kLong) {
        const int64_t run = std::min(kLong, p.K - k0);
        for (int64_t m = 0; m < p.M; ++m)
          for (int64_t k = 0; k < run; ++k) a[k * p.M + m] = p.a[m * p.K + k0 + k];
        for (int64_t k = 0; k < run;) {
          const float* const w = p.w + (k0 + k) * p.N + j;
          const bool four = k + kHigh <= run;
          (four ? add_few<kHigh> : add_few<1>)(sums.data(), k > 0, p.M, cols, &a[k * p.M], w, p.N);
          k += four ? kHigh : 1;
        }
        for (int64_t m = 0; m < p.M; ++m) {
          float* const out = p.out + m * p.N + j;
          const float* const start = k0 > 0 ? out : p.start ? p.start + m * p.N + j : nullptr;
          const float* const bias = p.bias && k0 + run == p.K ? p.bias + j : nullptr;
          for (int64_t i = 0; i < cols; ++i)
            out[i] = sums[m * cols + i] + (start ? start[i] : 0.f) + (bias ? bias[i] : 0.f);
        }
      }
    }
  });
}

}  // namespace lorakern
