// Launchers of kron_delta on CUDA; kernels in kron_delta.cuh.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "kron_delta.cuh"
#include "launch.h"

namespace lorakern {
namespace {

// kPack values of d in one load: 16 bytes where Q allows
template <typename scalar_t, int kPack = 16 / sizeof(scalar_t)>
void make_kron(at::Tensor& dw, const at::Tensor& c, const at::Tensor& d, double scale) {
  using acc_t = at::opmath_type<scalar_t>;
  if constexpr (kPack > 1)
    if (d.size(1) % kPack != 0) return make_kron<scalar_t, kPack / 2>(dw, c, d, scale);
  launch(&kron_delta_fwd_kernel<scalar_t, acc_t, kPack>, ceil_div(dw.size(0), kKronWarps),
         kKronThreads, 0, dw.mutable_data_ptr<scalar_t>(), c.const_data_ptr<scalar_t>(),
         d.const_data_ptr<scalar_t>(), scale, c.size(0), c.size(1), d.size(0), d.size(1));
}

}  // namespace

at::Tensor kron_delta_fwd_cuda(const at::Tensor& c, const at::Tensor& d, double scale) {
  check_like(d, "d", c);
  const c10::cuda::CUDAGuard guard(c.device());
  const at::Tensor c_AB = c.contiguous(), d_PQ = aligned(d);
  at::Tensor dw = at::empty({c.size(0) * d.size(0), c.size(1) * d.size(1)}, c.options());
  if (dw.numel() == 0) return dw;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dw.scalar_type(), "kron_delta",
                                  [&] { make_kron<scalar_t>(dw, c_AB, d_PQ, scale); });
  return dw;
}

std::tuple<at::Tensor, at::Tensor> kron_delta_bwd_cuda(const at::Tensor& ddelta,
                                                       const at::Tensor& c, const at::Tensor& d,
                                                       double scale, std::array<bool, 2> needs) {
  const int64_t A = c.size(0), B = c.size(1), P = d.size(0), Q = d.size(1);
  check_shape(ddelta, "ddelta", {A * P, B * Q});
  check_like(ddelta, "ddelta", c);
  check_like(d, "d", c);
  const c10::cuda::CUDAGuard guard(c.device());
  const at::Tensor dw = ddelta.contiguous(), c_AB = c.contiguous(), d_PQ = d.contiguous();
  const bool any = dw.numel() > 0;
  at::Tensor dc = make_grad(c, needs[0], any), dd = make_grad(d, needs[1], any);
  if (!any || !(needs[0] || needs[1])) return {dc, dd};

  const int64_t tiles = ceil_div(P * Q, kKronTile);
  const int64_t share = std::max<int64_t>(kKronWarps, ceil_div(A * B * tiles, kBlocks));
  const int64_t parts = ceil_div(A * B, share);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dw.scalar_type(), "kron_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto wide = dw.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
    at::Tensor dc_parts = at::empty({needs[0] ? tiles : 0, A, B}, wide);
    at::Tensor dd_parts = at::empty({needs[1] ? parts : 0, P, Q}, wide);
    launch(&kron_delta_bwd_kernel<scalar_t, acc_t>, tiles * parts, kKronThreads, 0,
           needs[0] ? dc_parts.mutable_data_ptr<acc_t>() : nullptr,
           needs[1] ? dd_parts.mutable_data_ptr<acc_t>() : nullptr, dw.const_data_ptr<scalar_t>(),
           c_AB.const_data_ptr<scalar_t>(), d_PQ.const_data_ptr<scalar_t>(), scale, A, B, P, Q,
           share);
    sum_parts<scalar_t, acc_t>(dc, dc_parts);
    sum_parts<scalar_t, acc_t>(dd, dd_parts);
  });
  return {dc, dd};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_delta_fwd_cuda", &lorakern::kron_delta_fwd_cuda);
  m.def("kron_delta_bwd_cuda", &lorakern::kron_delta_bwd_cuda);
}
