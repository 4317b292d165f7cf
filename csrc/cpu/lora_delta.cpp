// lora_delta on CPU. Spec: lorakern/ops/lora_delta/reference.py
//
// delta[O, I] = scale · up[O, R] down[R, I], and its gradients. The plain-torch spec writes the
// product, reads it back for the scale and in 16-bit rounds it in between; here the scale joins
// the sums before the one rounding.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "linear.h"

namespace lorakern {
namespace {

template <typename scalar_t>
struct Scaled : Block<scalar_t, false> {
  using Base = Block<scalar_t, false>;
  using typename Base::acc_t;
  acc_t scale;

  void store(int64_t slot, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < used; ++j) sums[i * ld + j] *= scale;
    Base::store(slot, row, rows, col, used, sums, ld);
  }
};

// scale · a[M, K] w, with w [K, N], or [N, K] when it is turned
at::Tensor product(const at::Tensor& a, const at::Tensor& w, bool turned, double scale) {
  const int64_t M = a.size(0), K = a.size(1), N = w.size(turned ? 0 : 1);
  const at::Tensor left = a.contiguous(), right = w.contiguous();
  at::Tensor out = at::empty({M, N}, a.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "lora_delta", [&] {
    const LowRank<scalar_t> p{M, K, N, 0, data<scalar_t>(left), data<scalar_t>(right), nullptr,
                              nullptr, nullptr, turned, out.mutable_data_ptr<scalar_t>(),
                              a.options()};
    Scaled<scalar_t> op{{p}, static_cast<at::opmath_type<scalar_t>>(scale)};
    block_product(op, rows_of(op));
  });
  return out;
}

}  // namespace

at::Tensor lora_delta_fwd_cpu(const at::Tensor& down, const at::Tensor& up, double scale) {
  check_shape(up, "up", {up.size(0), down.size(0)});
  check_like(up, "up", down);
  return product(up, down, false, scale);
}

std::tuple<at::Tensor, at::Tensor> lora_delta_bwd_cpu(const at::Tensor& ddelta,
                                                      const at::Tensor& down, const at::Tensor& up,
                                                      double scale, std::array<bool, 2> needs) {
  check_shape(up, "up", {up.size(0), down.size(0)});
  check_shape(ddelta, "ddelta", {up.size(0), down.size(1)});
  check_like(up, "up", down);
  check_like(ddelta, "ddelta", down);
  const at::Tensor none = at::empty({0}, down.options());
  return {needs[0] ? product(up.t(), ddelta, false, scale) : none,
          needs[1] ? product(ddelta, down, true, scale) : none};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("lora_delta_fwd_cpu", &lorakern::lora_delta_fwd_cpu);
  m.def("lora_delta_bwd_cpu", &lorakern::lora_delta_bwd_cpu);
}
