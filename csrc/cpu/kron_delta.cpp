// kron_delta on CPU. Spec: lorakern/ops/kron_delta/reference.py
//
// delta[A·P, B·Q] = scale · C ⊗ D. The plain-torch spec makes it twice (once unscaled) and, backward,
// turns its gradient in memory. Here delta is written once and its gradient read once.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "kron.h"

namespace lorakern {
namespace {

template <typename acc_t>
at::Tensor widened(const at::Tensor& t) {
  return t.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
}

}  // namespace

at::Tensor kron_delta_fwd_cpu(const at::Tensor& c, const at::Tensor& d, double scale) {
  check_like(d, "d", c);
  const int64_t A = c.size(0), B = c.size(1), P = d.size(0), Q = d.size(1);
  at::Tensor delta = at::empty({A * P, B * Q}, c.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, c.scalar_type(), "kron_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const at::Tensor c_wide = widened<acc_t>(c), d_wide = widened<acc_t>(d);
    const acc_t *const from_c = c_wide.const_data_ptr<acc_t>(),
                *const from_d = d_wide.const_data_ptr<acc_t>();
    scalar_t* const out = delta.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, A * P, 1 + 4096 / (1 + B * Q), [&](int64_t begin, int64_t end) {
      std::vector<acc_t> line(B * Q);
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t b = 0; b < B; ++b) {
          const acc_t by = static_cast<acc_t>(scale) * from_c[o / P * B + b];
          const acc_t* const row = from_d + o % P * Q;
          for (int64_t q = 0; q < Q; ++q) line[b * Q + q] = by * row[q];
        }
        narrow<scalar_t, acc_t>(out + o * B * Q, line.data(), nullptr, B * Q);
      }
    });
  });
  return delta;
}

std::tuple<at::Tensor, at::Tensor> kron_delta_bwd_cpu(const at::Tensor& ddelta, const at::Tensor& c,
                                                      const at::Tensor& d, double scale,
                                                      std::array<bool, 2> needs) {
  const int64_t A = c.size(0), B = c.size(1), P = d.size(0), Q = d.size(1);
  check_shape(ddelta, "ddelta", {A * P, B * Q});
  check_contiguous(ddelta, "ddelta");
  check_like(ddelta, "ddelta", c);
  check_like(d, "d", c);
  at::Tensor dc = at::empty(needs[0] ? c.sizes() : at::IntArrayRef{0}, c.options());
  at::Tensor dd = at::empty(needs[1] ? d.sizes() : at::IntArrayRef{0}, c.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, c.scalar_type(), "kron_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const at::Tensor c_wide = widened<acc_t>(c), d_wide = widened<acc_t>(d);
    const acc_t *const from_c = c_wide.const_data_ptr<acc_t>(),
                *const from_d = d_wide.const_data_ptr<acc_t>();
    const scalar_t* const from = ddelta.const_data_ptr<scalar_t>();
    // a row p of D gathers from the rows (a, p): its share of dC, and its own gradient
    at::Tensor parts = scratch<acc_t>(P * A * B, c.options());
    acc_t* const part = parts.mutable_data_ptr<acc_t>();
    at::parallel_for(0, P, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> line(B * Q), sums(Q);
      for (int64_t p = begin; p < end; ++p) {
        std::fill(sums.begin(), sums.end(), acc_t(0));
        for (int64_t a = 0; a < A; ++a) {
          widen(line.data(), from + (a * P + p) * B * Q, B * Q);
          for (int64_t b = 0; b < B; ++b) {
            acc_t dot = 0;
            const acc_t by = from_c[a * B + b];
            for (int64_t q = 0; q < Q; ++q) {
              dot += line[b * Q + q] * from_d[p * Q + q];
              sums[q] += by * line[b * Q + q];
            }
            part[(p * A + a) * B + b] = dot;
          }
        }
        if (!needs[1]) continue;
        for (int64_t q = 0; q < Q; ++q)
          dd.mutable_data_ptr<scalar_t>()[p * Q + q] =
              static_cast<scalar_t>(static_cast<acc_t>(scale) * sums[q]);
      }
    });
    for (int64_t i = 0; needs[0] && i < A * B; ++i) {
      acc_t sum = 0;
      for (int64_t p = 0; p < P; ++p) sum += part[p * A * B + i];
      dc.mutable_data_ptr<scalar_t>()[i] = static_cast<scalar_t>(static_cast<acc_t>(scale) * sum);
    }
  });
  return {dc, dd};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_delta_fwd_cpu", &lorakern::kron_delta_fwd_cpu);
  m.def("kron_delta_bwd_cpu", &lorakern::kron_delta_bwd_cpu);
}
