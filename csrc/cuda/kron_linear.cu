// Launchers of the gradients of kron_linear on CUDA; the kernel of those of C and D is in
// kron_linear.cuh, that of x is torch's products.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "kron_linear.cuh"
#include "launch.h"

namespace lorakern {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// C or D in the type of the sums: its up, or up down
at::Tensor whole(const at::Tensor& up, const OptionalTensor& down, at::ScalarType wide) {
  const at::Tensor u = up.to(wide);
  return (down ? at::mm(u, down->to(wide)) : u).contiguous();
}

void check_rank(const at::Tensor& up, const OptionalTensor& down, const char* up_name,
                const char* down_name, const at::Tensor& x) {
  check_like(up, up_name, x);
  if (!down) return;
  check_like(*down, down_name, x);
  check_shape(*down, down_name, {up.size(1), down->size(1)});
}

// dC [A, B] and dD [P, Q] in the type of the sums; empty where not needed
template <typename scalar_t, int kC>
void factor_gradients(at::Tensor& dc, at::Tensor& dd, const at::Tensor& dy, const at::Tensor& x,
                      const at::Tensor& c, const at::Tensor& d, const at::Tensor& gain,
                      double scale) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t A = c.size(0), B = c.size(1), P = d.size(0), Q = d.size(1), M = dy.size(0);
  const int64_t tiles_C = ceil_div(A, kC) * ceil_div(B, kC),
                tiles_D = ceil_div(P, kKronSide) * ceil_div(Q, kKronSide);
  // rows of a block: a multiple of the rows that it takes at once
  constexpr int64_t kAtOnce = kKronSide / kC;
  const int64_t share =
      kAtOnce * ceil_div(M, kAtOnce * std::max<int64_t>(1, kBlocks / (tiles_C * tiles_D)));
  const int64_t shares = ceil_div(M, share);
  const bool need_dc = dc.numel() > 0, need_dd = dd.numel() > 0;
  at::Tensor dc_parts = at::empty({need_dc ? shares * tiles_D : 0, A, B}, dc.options());
  at::Tensor dd_parts = at::empty({need_dd ? shares * tiles_C : 0, P, Q}, dd.options());
  launch(&kron_linear_factors_kernel<scalar_t, acc_t, kC>, shares * tiles_C * tiles_D,
         kKronLinearThreads, kKronLinearShared * sizeof(acc_t),
         need_dc ? dc_parts.mutable_data_ptr<acc_t>() : nullptr,
         need_dd ? dd_parts.mutable_data_ptr<acc_t>() : nullptr, dy.const_data_ptr<scalar_t>(),
         x.const_data_ptr<scalar_t>(), c.const_data_ptr<acc_t>(), d.const_data_ptr<acc_t>(),
         gain.defined() ? gain.const_data_ptr<acc_t>() : nullptr, scale,
         KronSizes{M, A, B, P, Q, share});
  sum_parts<acc_t, acc_t>(dc, dc_parts);
  sum_parts<acc_t, acc_t>(dd, dd_parts);
}

}  // namespace

// The gradients of the factors alone: dc_up, dc_down, dd_up, dd_down
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> kron_linear_factors_cuda(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& c_up, const OptionalTensor& c_down,
    const at::Tensor& d_up, const OptionalTensor& d_down, double scale, const OptionalTensor& gain,
    std::array<bool, 4> needs) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_rank(c_up, c_down, "c_up", "c_down", x);
  check_rank(d_up, d_down, "d_up", "d_down", x);
  const int64_t A = c_up.size(0), B = (c_down ? *c_down : c_up).size(1), P = d_up.size(0),
                Q = (d_down ? *d_down : d_up).size(1);
  auto sizes = x.sizes().vec();
  TORCH_CHECK_VALUE(x.dim() > 0 && sizes.back() == B * Q, "x: want [..., ", B * Q, "], got ",
                    x.sizes());
  sizes.back() = A * P;
  check_shape(dy, "dy", sizes);
  check_like(dy, "dy", x);
  const auto wide = at::toOpMathType(x.scalar_type());
  if (gain) {
    check_shape(*gain, "gain", {A * P});
    // one near 1 is lost in 16-bit
    check_like(*gain, "gain", x, wide);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor g = gain ? gain->contiguous() : at::Tensor();

  const at::Tensor c = whole(c_up, c_down, wide), d = whole(d_up, d_down, wide);
  const bool need_dc = needs[0] || needs[1], need_dd = needs[2] || needs[3];
  // no rows or no columns: no block runs, and the sums are 0
  const bool any = x.numel() > 0 && dy.numel() > 0;
  at::Tensor dc = make_grad(c, need_dc, any), dd = make_grad(d, need_dd, any);
  if (any && (need_dc || need_dd)) {
    const at::Tensor dy_MO = dy.contiguous().view({-1, A * P}),
                     x_MI = x.contiguous().view({-1, B * Q});
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "kron_linear", [&] {
      const auto run = std::max(A, B) <= 8    ? factor_gradients<scalar_t, 8>
                       : std::max(A, B) <= 16 ? factor_gradients<scalar_t, 16>
                                              : factor_gradients<scalar_t, 32>;
      run(dc, dd, dy_MO, x_MI, c, d, g, scale);
    });
  }
  // through the product up down, in the type of the sums
  const auto none = at::empty({0}, x.options());
  const auto of_up = [&](bool need, const at::Tensor& grad, const OptionalTensor& down) {
    if (!need) return none;
    return (down ? at::mm(grad, down->to(wide).t()) : grad).to(x.scalar_type());
  };
  const auto of_down = [&](bool need, const at::Tensor& grad, const at::Tensor& up,
                           const OptionalTensor& down) {
    return need && down ? at::mm(up.to(wide).t(), grad).to(x.scalar_type()) : none;
  };
  return {of_up(needs[0], dc, c_down), of_down(needs[1], dc, c_up, c_down),
          of_up(needs[2], dd, d_down), of_down(needs[3], dd, d_up, d_down)};
}

// The whole backward where sums are no wider than results, so that adding in place rounds nothing
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
kron_linear_bwd_cuda(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                     const at::Tensor& c_up, const OptionalTensor& c_down, const at::Tensor& d_up,
                     const OptionalTensor& d_down, double scale, const OptionalTensor& gain,
                     std::array<bool, 6> needs) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(!needs[0] || at::toOpMathType(dtype) == dtype,
                    "dx: want float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(!needs[5], "dgain: this kernel makes none");
  auto [dc_up, dc_down, dd_up, dd_down] = kron_linear_factors_cuda(
      dy, x, c_up, c_down, d_up, d_down, scale, gain, {needs[1], needs[2], needs[3], needs[4]});
  at::Tensor dx = at::empty({0}, x.options());
  at::Tensor dgain = at::empty({0}, gain ? gain->options() : x.options());
  if (needs[0]) {
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor c = whole(c_up, c_down, dtype), d = whole(d_up, d_down, dtype);
    const int64_t A = c.size(0), B = c.size(1), P = d.size(0), Q = d.size(1);
    check_shape(weight, "weight", {A * P, B * Q});
    check_like(weight, "weight", x);
    const int64_t M = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
    at::Tensor dy_MO = dy.reshape({M, A * P});
    if (gain) dy_MO = at::mul(dy_MO, *gain);
    dx = at::mm(dy_MO, weight);
    const at::Tensor t_MBP = at::matmul(c.t(), dy_MO.view({M, A, P}));
    dx.view({M * B, Q}).addmm_(t_MBP.view({M * B, P}), d, 1, scale);
    dx = dx.view(x.sizes());
  }
  return {dx, dc_up, dc_down, dd_up, dd_down, dgain};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_linear_factors_cuda", &lorakern::kron_linear_factors_cuda);
  m.def("kron_linear_bwd_cuda", &lorakern::kron_linear_bwd_cuda);
}
