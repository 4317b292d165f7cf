// The gradient of a gain: dgain[o] = sum over rows of dy[m, o] · acc[m, o], where y = gain ∘ acc + b.
// It is in the dtype of the sums, as the gain is.
//
// Where acc was not kept, the forward product is run once more, and each of its finished sums meets
// dy while it is in a register tile's reach: nothing of size M·O is read but dy.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "block_product.h"

namespace lorakern {

// Forward: the op of a forward product, without gain and bias
template <typename Forward>
struct GainGradient : Forward {
  using scalar_t = typename Forward::scalar_t;
  using acc_t = typename Forward::acc_t;
  static constexpr bool kPlainStore = false;
  const scalar_t* dy;
  // [slots, N]
  acc_t* parts;

  void store(int64_t slot, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) {
    acc_t* const part = parts + slot * this->p.N + col;
    acc_t wide[kPanel<acc_t>];
    // short runs of a long sum keep it exact
    for (int64_t from = 0; from < rows; from += kShortRun) {
      acc_t run[kPanel<acc_t>] = {};
      for (int64_t i = from; i < std::min(rows, from + kShortRun); ++i) {
        widen(wide, dy + (row + i) * this->p.N + col, used);
        for (int64_t j = 0; j < used; ++j) run[j] += wide[j] * sums[i * ld + j];
      }
      for (int64_t j = 0; j < used; ++j) part[j] += run[j];
    }
  }
};

template <typename Forward>
void gain_gradient(const Forward& forward, const typename Forward::scalar_t* dy,
                   typename Forward::acc_t* dgain) {
  using acc_t = typename Forward::acc_t;
  const auto& p = forward.p;
  const Rows rows = rows_of(forward);
  at::Tensor parts = at::zeros({rows.slots * p.N},
                               p.options.dtype(c10::CppTypeToScalarType<acc_t>::value));
  GainGradient<Forward> op{{forward}, dy, parts.template mutable_data_ptr<acc_t>()};
  block_product(op, rows);
  for (int64_t o = 0; o < p.N; ++o) {
    acc_t sum = 0;
    for (int64_t slot = 0; slot < rows.slots; ++slot) sum += op.parts[slot * p.N + o];
    dgain[o] = sum;
  }
}

// The same from y, with acc = (y - bias) / gain, in one pass over y and dy. False where the rounding
// of y hides acc: at a gain near 0, or under a bias whose output is over twice as large in the mean.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
bool gain_gradient(const scalar_t* y, const scalar_t* bias, const acc_t* gain, const scalar_t* dy,
                   int64_t M, int64_t O, acc_t* dgain) {
  // columns whose sums and values are at hand together
  constexpr int64_t kSome = 256;
  const int64_t threads = M * O < kSerial ? 1 : at::get_num_threads();
  const int64_t slots = std::clamp<int64_t>((M + kShortRun - 1) / kShortRun, 1, threads);
  std::vector<acc_t> wide_bias(O);
  if (bias) widen(wide_bias.data(), bias, O);
  // of a slot: sums of dy · a, a² and y², where a = y - bias
  std::vector<acc_t> parts(slots * 3 * O);
  at::parallel_for(0, slots, 1, [&](int64_t b, int64_t e) {
    for (int64_t slot = b; slot < e; ++slot) {
      acc_t* const part = parts.data() + slot * 3 * O;
      const int64_t end = (slot + 1) * M / slots;
      for (int64_t from = slot * M / slots; from < end; from += kShortRun)
        for (int64_t o = 0; o < O; o += kSome) {
          const int64_t some = std::min(kSome, O - o);
          acc_t run[3][kSome] = {}, own[kSome], other[kSome];
          for (int64_t m = from; m < std::min(end, from + kShortRun); ++m) {
            widen(own, y + m * O + o, some);
            widen(other, dy + m * O + o, some);
            for (int64_t i = 0; i < some; ++i) {
              const acc_t a = own[i] - wide_bias[o + i];
              run[0][i] += other[i] * a;
              run[1][i] += a * a;
              run[2][i] += own[i] * own[i];
            }
          }
          for (int64_t k = 0; k < 3; ++k)
            for (int64_t i = 0; i < some; ++i) part[k * O + o + i] += run[k][i];
        }
    }
  });
  for (int64_t o = 0; o < O; ++o) {
    acc_t sum[3] = {};
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t i = 0; i < 3; ++i) sum[i] += parts[(3 * slot + i) * O + o];
    if (!(std::abs(gain[o]) > acc_t(1) / 16 && sum[2] <= 4 * sum[1])) return false;
    dgain[o] = sum[0] / gain[o];
  }
  return true;
}

}  // namespace lorakern
