// out = a W of few rows in float32, W read once as it lies in memory. To copy a weight into panels
// takes longer than to multiply few rows by it.

#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "block.h"

namespace lorakern {

// rows that are few, and multiply-adds worth a thread
constexpr int64_t kFewRows = 32;
constexpr int64_t kThread = 1 << 16;
// columns of a at hand in L2, and bytes of sums in L1
constexpr int64_t kColumns = 1024;
constexpr int64_t kSumBytes = 48 << 10;
// rows of W whose products are in registers together
constexpr int kAcross = kTileRows > 6 ? 12 : 6;

struct FewRows {
  int64_t M, K, N;
  const float *a, *w;
  // either may be null
  const float *bias, *start;
  float* out;
};

// sums[rows, kCols] = a[rows, n] w[kCols, n]ᵀ of the two rows of a that lie side by side, a vector
// of each in turn; rows of w are ld apart
template <int kCols>
void dots_of_pair(float (*sums)[kAcross], const float* a, const float* w, int64_t ld, int64_t n) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t kLanes = Vec::size();
  Vec dots[2][kCols];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kCols; ++j) dots[i][j] = Vec(0.f);
  const auto step = [&](int64_t k, const auto& load) {
    const Vec rows[2] = {Vec::loadu(a + 2 * k), Vec::loadu(a + 2 * k + kLanes)};
#pragma GCC unroll 12
    for (int j = 0; j < kCols; ++j) {
      const Vec x = load(w + j * ld + k);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) dots[i][j] = at::vec::fmadd(rows[i], x, dots[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) step(k, [](const float* v) { return Vec::loadu(v); });
  if (k < n) step(k, [&](const float* v) { return Vec::loadu(v, n - k); });
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kCols; ++j)
      sums[i][j] = at::vec::vec_reduce_all<float>(
          [](const Vec& x, const Vec& y) { return x + y; }, dots[i][j]);
}

// out[M, N] = a[M, K] w[N, K]ᵀ + bias + start
inline void few_rows_transposed(const FewRows& p) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t kLanes = Vec::size();
  at::parallel_for(0, p.N, std::max<int64_t>(kAcross, kThread / (p.M * p.K)), [&](int64_t b,
                                                                                  int64_t e) {
    std::vector<float> pairs((p.M + 1) / 2 * 2 * kColumns);
    for (int64_t k = 0; k < p.K; k += kColumns) {
      const int64_t depth = std::min(kColumns, p.K - k);
      const int64_t padded = (depth + kLanes - 1) / kLanes * kLanes;
      // an odd last row is beside zeros
      std::fill(pairs.begin(), pairs.end(), 0.f);
      for (int64_t m = 0; m < p.M; ++m)
        for (int64_t i = 0; i < depth; i += kLanes)
          Vec::loadu(p.a + m * p.K + k + i, std::min(kLanes, depth - i))
              .store(&pairs[m / 2 * 2 * padded + 2 * i + m % 2 * kLanes]);
      const bool last = k + depth == p.K;
      for (int64_t n = b; n < e; n += kAcross) {
        const int64_t across = std::min<int64_t>(kAcross, e - n);
        const float* const w = p.w + n * p.K + k;
        for (int64_t m = 0; m < p.M; m += 2) {
          float sums[2][kAcross];
          const float* const a = &pairs[m * padded];
          if (across == kAcross) {
            dots_of_pair<kAcross>(sums, a, w, p.K, depth);
          } else {
            for (int64_t j = 0; j < across; ++j) {
              float one[2][kAcross];
              dots_of_pair<1>(one, a, w + j * p.K, p.K, depth);
              for (int i = 0; i < 2; ++i) sums[i][j] = one[i][0];
            }
          }
          for (int64_t i = 0; i < std::min<int64_t>(2, p.M - m); ++i) {
            float* const out = p.out + (m + i) * p.N + n;
            const float* const start = k > 0 ? out : p.start ? p.start + (m + i) * p.N + n : nullptr;
            for (int64_t j = 0; j < across; ++j)
              out[j] = sums[i][j] + (start ? start[j] : 0.f) + (last && p.bias ? p.bias[n + j] : 0.f);
          }
        }
      }
    }
  });
}

// sums[M, cols] (+)= a[kHigh, M]ᵀ w[kHigh, cols], with rows of w ld apart
template <int kHigh>
void add_few(float* sums, bool add, int64_t M, int64_t cols, const float* a, const float* w,
             int64_t ld) {
  using Vec = at::vec::Vectorized<float>;
  const auto columns = [&](int64_t j, const auto& load, const auto& store) {
    Vec rows[kHigh][2];
#pragma GCC unroll 12
    for (int k = 0; k < kHigh; ++k) {
      load(rows[k], w + k * ld + j);
      __builtin_prefetch(w + (k + kHigh) * ld + j);
    }
    for (int64_t m = 0; m < M; ++m) {
      float* const to = sums + m * cols + j;
      Vec sum[2] = {Vec(0.f), Vec(0.f)};
      if (add) load(sum, to);
#pragma GCC unroll 12
      for (int k = 0; k < kHigh; ++k) {
        const Vec x(a[k * M + m]);
        sum[0] = at::vec::fmadd(x, rows[k][0], sum[0]);
        sum[1] = at::vec::fmadd(x, rows[k][1], sum[1]);
      }
      store(to, sum);
    }
  };
  int64_t j = 0;
  for (; j + kPanel<float> <= cols; j += kPanel<float>)
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
  constexpr int64_t kLong = kRun<float, false>, kWide = kPanel<float>;
  const int64_t fit = kSumBytes / int64_t(sizeof(float)) / p.M / kWide * kWide;
  const int64_t most = std::max(kWide, std::min(kColumns, fit));
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
          const bool many = k + kAcross <= run;
          (many ? add_few<kAcross> : add_few<1>)(sums.data(), k > 0, p.M, cols, &a[k * p.M], w, p.N);
          k += many ? kAcross : 1;
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
