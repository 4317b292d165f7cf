// Products with the two factors of a Kronecker update, C [A, B] and D [P, Q]: a row of x is a [B, Q]
// matrix, one of y an [A, P] one.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>

#include <optional>
#include <vector>

#include "pack.h"

namespace lorakern {

template <typename acc_t>
at::Tensor scratch(int64_t size, const at::TensorOptions& like) {
  return at::empty({size}, like.dtype(c10::CppTypeToScalarType<acc_t>::value));
}

// few values: the last vector overlaps the one before it
template <typename acc_t>
inline void copy_few(acc_t* to, const acc_t* from, int64_t n) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  if (n < kLanes) {
    for (int64_t j = 0; j < n; ++j) to[j] = from[j];
    return;
  }
  for (int64_t j = 0; j + kLanes <= n; j += kLanes) Vec::loadu(from + j).store(to + j);
  if (n % kLanes != 0) Vec::loadu(from + n - kLanes).store(to + n - kLanes);
}

// to += from, of few values: the last vector is summed before what it overlaps is stored
template <typename acc_t>
inline void add_few(acc_t* to, const acc_t* from, int64_t n) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  if (n < kLanes) {
    for (int64_t j = 0; j < n; ++j) to[j] += from[j];
    return;
  }
  const int64_t end = n - kLanes;
  const Vec last = Vec::loadu(to + end) + Vec::loadu(from + end);
  for (int64_t j = 0; j < end; j += kLanes)
    (Vec::loadu(to + j) + Vec::loadu(from + j)).store(to + j);
  last.store(to + end);
}

// to[rows, cols] (+)= from
template <typename acc_t>
void put_matrix(acc_t* to, int64_t to_ld, bool add, const acc_t* from, int64_t ld, int64_t rows,
                int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, to += to_ld, from += ld)
    add ? add_few(to, from, cols) : copy_few(to, from, cols);
}

// lanes past the end of a matrix that are read, but nothing is made of them, or written
template <typename acc_t>
constexpr int64_t kSlack = kPanel<acc_t>;

// A right operand [k, cols] packed in panels, one after another.
template <typename acc_t>
struct Panels {
  int64_t k, cols;
  std::vector<acc_t> data;

  // transposed: src is [cols, k]
  Panels(const acc_t* src, bool transposed, int64_t k, int64_t cols) : k(k), cols(cols) {
    data.resize(k * padded<acc_t>(cols));
    for (int64_t c = 0; c < cols; c += kPanel<acc_t>)
      pack_panel<false>(data.data() + c * k, src, transposed, k, cols, c, width(c));
  }
  // of the panel from a column
  int64_t width(int64_t c) const {
    return cols - c > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>;
  }
  // out[rows, cols] = a[rows, k] times it, and kSlack lanes behind, which are written: the last
  // columns go first, and what a row's panel has beyond them the next row overwrites. Not so where
  // sums are in runs, each upon those before: then by room, rows of a panel.
  void multiply(acc_t* out, const acc_t* a, int64_t lda, int64_t rows, acc_t* room) const {
    for (int64_t c = (cols - 1) / kPanel<acc_t> * kPanel<acc_t>; c >= 0; c -= kPanel<acc_t>) {
      const int64_t across = width(c);
      const bool fits = cols - c >= across || k <= kRun<acc_t>;
      multiply_panel<acc_t, false, false>(fits ? out + c : room, fits ? cols : across, false, rows,
                                          across == kPanel<acc_t>,
                                          {a, lda, data.data() + c * k, across, k});
      if (!fits) put_matrix(out + c, cols, false, room, across, rows, cols - c);
    }
  }
};

// C [A, B] whole, and D [P, Q] whole or as d_up [P, R] d_down [R, Q], in the type of the sums.
template <typename acc_t>
struct Kron {
  // R is 0 when D is whole
  int64_t A, B, P, Q, R;
  at::Tensor c, d, d_up, d_down;
  const acc_t* C() const { return c.const_data_ptr<acc_t>(); }
};

template <typename scalar_t>
Kron<at::opmath_type<scalar_t>> kron(const at::Tensor& c_up, const std::optional<at::Tensor>& c_down,
                                     const at::Tensor& d_up,
                                     const std::optional<at::Tensor>& d_down) {
  const auto type = c10::CppTypeToScalarType<at::opmath_type<scalar_t>>::value;
  const auto wide = [&](const at::Tensor& t) { return t.to(type).contiguous(); };
  const at::Tensor c = c_down ? at::matmul(wide(c_up), wide(*c_down)) : wide(c_up);
  const int64_t A = c.size(0), B = c.size(1), P = d_up.size(0);
  if (!d_down) return {A, B, P, d_up.size(1), 0, c, wide(d_up), {}, {}};
  const int64_t R = d_up.size(1), Q = d_down->size(1);
  // two narrow products must save more than they lose in width
  if (2 * R * (P + Q) > P * Q)
    return {A, B, P, Q, 0, c, at::matmul(wide(d_up), wide(*d_down)), {}, {}};
  return {A, B, P, Q, R, c, {}, wide(d_up), wide(*d_down)};
}

// a times D or Dᵀ, in one product or, of a low rank, in two with t[rows, R] between them.
template <typename acc_t>
struct Inner {
  std::vector<Panels<acc_t>> steps;

  // turned: by Dᵀ
  Inner(const Kron<acc_t>& f, bool turned) {
    const auto add = [&](const at::Tensor& m) {
      const int64_t k = m.size(turned ? 1 : 0), cols = m.size(turned ? 0 : 1);
      steps.emplace_back(m.const_data_ptr<acc_t>(), turned, k, cols);
    };
    if (f.R == 0) {
      add(f.d);
    } else {
      add(turned ? f.d_down : f.d_up);
      add(turned ? f.d_up : f.d_down);
    }
  }
  // out[rows, cols] and t[rows, R], with slack behind them
  void multiply(acc_t* out, acc_t* t, const acc_t* a, int64_t lda, int64_t rows,
                acc_t* room) const {
    if (steps.size() == 2) {
      steps[0].multiply(t, a, lda, rows, room);
      a = t;
      lda = steps[0].cols;
    }
    steps.back().multiply(out, a, lda, rows, room);
  }
};

// out[rows, ldc] (+)= left[rows, k] right[k, ld], or leftᵀ [k, rows]; rows of out take whole panels,
// and right is read up to there
template <bool kTurned, typename acc_t>
void multiply_all(acc_t* out, int64_t ldc, const acc_t* left, int64_t lda, int64_t rows,
                  const acc_t* right, int64_t ld, int64_t k, int64_t cols, bool add = false) {
  for (int64_t c = 0; c < cols; c += kPanel<acc_t>)
    multiply_panel<acc_t, false, kTurned>(out + c, ldc, add, rows, cols - c > kWidth<acc_t>,
                                          {left, lda, right + c, ld, k});
}

}  // namespace lorakern
