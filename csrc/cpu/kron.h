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

// A right operand [k, cols] packed in panels, one after another.
template <typename acc_t>
struct Panels {
  int64_t k, cols;
  std::vector<acc_t> data;

  // transposed: src is [cols, k]
  Panels(const acc_t* src, bool transposed, int64_t k, int64_t cols) : k(k), cols(cols) {
    data.resize(k * padded<acc_t>(cols));
    each([&](int64_t first, int64_t width, acc_t* panel) {
      pack_panel<false>(panel, src, transposed, k, cols, first, width);
    });
  }
  template <typename Visit>
  void each(const Visit& visit) {
    for (int64_t c = 0; c < cols; c += kPanel<acc_t>)
      visit(c, cols - c > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>, data.data() + c * k);
  }
  // out[rows, padded(cols)] = a[rows, k] times it
  void multiply(acc_t* out, const acc_t* a, int64_t lda, int64_t rows) {
    each([&](int64_t c, int64_t width, const acc_t* panel) {
      multiply_panel<acc_t, false, false>(out + c, padded<acc_t>(cols), false, rows,
                                          width == kPanel<acc_t>, {a, lda, panel, width, k});
    });
  }
};

// C [A, B] and D [P, Q] whole, in the type of the sums.
template <typename acc_t>
struct Kron {
  int64_t A, B, P, Q;
  at::Tensor c, d;
  const acc_t* C() const { return c.const_data_ptr<acc_t>(); }
  const acc_t* D() const { return d.const_data_ptr<acc_t>(); }
};

template <typename scalar_t>
Kron<at::opmath_type<scalar_t>> whole(const at::Tensor& c_up,
                                      const std::optional<at::Tensor>& c_down,
                                      const at::Tensor& d_up,
                                      const std::optional<at::Tensor>& d_down) {
  const auto type = c10::CppTypeToScalarType<at::opmath_type<scalar_t>>::value;
  const auto product = [&](const at::Tensor& up, const std::optional<at::Tensor>& down) {
    return (down ? at::matmul(up.to(type), down->to(type)) : up.to(type)).contiguous();
  };
  const at::Tensor c = product(c_up, c_down), d = product(d_up, d_down);
  return {c.size(0), c.size(1), d.size(0), d.size(1), c, d};
}

// lanes read past the end of a row's last matrix, which nothing is made of
template <typename acc_t>
constexpr int64_t kSlack = kPanel<acc_t>;

// sums[row, :] of [outer, inner] matrices that have their columns padded
template <typename acc_t>
void copy_rows(acc_t* to, const acc_t* from, int64_t outer, int64_t inner) {
  for (int64_t i = 0; i < outer; ++i)
    std::memcpy(to + i * inner, from + i * padded<acc_t>(inner), inner * sizeof(acc_t));
}

// out[rows, padded(cols)] = left[rows, k] right[k, ld], or leftᵀ [k, rows]; right has slack
template <bool kTurned, typename acc_t>
void multiply_small(acc_t* out, const acc_t* left, int64_t lda, int64_t rows, const acc_t* right,
                    int64_t ld, int64_t k, int64_t cols, bool add = false) {
  for (int64_t c = 0; c < cols; c += kPanel<acc_t>)
    multiply_panel<acc_t, false, kTurned>(out + c, padded<acc_t>(cols), add, rows,
                                          cols - c > kWidth<acc_t>,
                                          {left, lda, right + c, ld, k});
}

}  // namespace lorakern
