// The gradient of a gain: dgain[o] = sum over rows of dy[m, o] · acc[m, o], where y = gain ∘ acc + b.
// It is in the dtype of the sums, as the gain is.
//
// Where acc was not kept, the forward product is run once more, and each of its finished sums meets
// dy while it is in a register tile's reach: nothing of size M·O is read but dy.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "block_product.h"

namespace lorakern {

// Forward: the op of a forward product, without gain and bias
template <typename Forward>
struct GainGradient : Forward {
  using scalar_t = typename Forward::scalar_t;
  using acc_t = typename Forward::acc_t;
  const scalar_t* dy;
  // [slots, N]
  acc_t* parts;

  void store(int64_t slot, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) {
    acc_t* const part = parts + slot * this->p.N + col;
    acc_t wide[kPanel<acc_t>];
    // short runs of a long sum keep it exact
    for (int64_t from = 0; from < rows; from += kNarrowRun) {
      acc_t run[kPanel<acc_t>] = {};
      for (int64_t i = from; i < std::min(rows, from + kNarrowRun); ++i) {
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

// the same of an acc[M, O] that was kept
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
void gain_gradient(const scalar_t* acc, const scalar_t* dy, int64_t M, int64_t O, acc_t* dgain) {
  const int64_t threads = M * O < kSerial ? 1 : at::get_num_threads();
  const int64_t slots = std::clamp<int64_t>((M + kNarrowRun - 1) / kNarrowRun, 1, threads);
  std::vector<acc_t> parts(slots * O);
  at::parallel_for(0, slots, 1, [&](int64_t b, int64_t e) {
    std::vector<acc_t> run(O), one(O), other(O);
    for (int64_t slot = b; slot < e; ++slot) {
      acc_t* const part = parts.data() + slot * O;
      const int64_t end = (slot + 1) * M / slots;
      for (int64_t from = slot * M / slots; from < end; from += kNarrowRun) {
        std::fill(run.begin(), run.end(), acc_t(0));
        for (int64_t m = from; m < std::min(end, from + kNarrowRun); ++m) {
          widen(one.data(), acc + m * O, O);
          widen(other.data(), dy + m * O, O);
          for (int64_t o = 0; o < O; ++o) run[o] += one[o] * other[o];
        }
        for (int64_t o = 0; o < O; ++o) part[o] += run[o];
      }
    }
  });
  for (int64_t o = 0; o < O; ++o) {
    acc_t sum = 0;
    for (int64_t slot = 0; slot < slots; ++slot) sum += parts[slot * O + o];
    dgain[o] = sum;
  }
}

}  // namespace lorakern
