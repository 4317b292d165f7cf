// Launchers of hada_delta on CUDA; kernels in hada_delta.cuh.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "hada_delta.cuh"
#include "launch.h"

namespace lorakern {
namespace {

// ranks are counted in int
constexpr int64_t kMostHadaRanks = 1 << 30;

void check_hada_factors(const at::Tensor& down1, const at::Tensor& up1, const at::Tensor& down2,
                        const at::Tensor& up2) {
  const int64_t O = up1.size(0), I = down1.size(1), R1 = down1.size(0), R2 = down2.size(0);
  check_shape(up1, "up1", {O, R1});
  check_shape(down2, "down2", {R2, I});
  check_shape(up2, "up2", {O, R2});
  TORCH_CHECK_VALUE(R1 <= kMostHadaRanks && R2 <= kMostHadaRanks, "want ranks up to ",
                    kMostHadaRanks, ", got ", R1, " and ", R2);
  for (const auto& [t, name] : {std::pair{&up1, "up1"}, {&down2, "down2"}, {&up2, "up2"}})
    check_like(*t, name, down1);
}

}  // namespace

at::Tensor hada_delta_fwd_cuda(const at::Tensor& down1, const at::Tensor& up1,
                               const at::Tensor& down2, const at::Tensor& up2, double scale) {
  check_hada_factors(down1, up1, down2, up2);
  const int64_t O = up1.size(0), I = down1.size(1);
  const c10::cuda::CUDAGuard guard(down1.device());
  const at::Tensor d1 = down1.contiguous(), u1 = up1.contiguous(), d2 = down2.contiguous(),
                   u2 = up2.contiguous();
  at::Tensor dw = at::empty({O, I}, down1.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dw.scalar_type(), "hada_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    launch(&hada_delta_fwd_kernel<scalar_t, acc_t>, ceil_div(O, kHadaTile) * ceil_div(I, kHadaTile),
           kHadaThreads, kHadaShared * sizeof(acc_t), dw.mutable_data_ptr<scalar_t>(),
           d1.const_data_ptr<scalar_t>(), u1.const_data_ptr<scalar_t>(),
           d2.const_data_ptr<scalar_t>(), u2.const_data_ptr<scalar_t>(), scale, O, I, d1.size(0),
           d2.size(0));
  });
  return dw;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hada_delta_bwd_cuda(
    const at::Tensor& ddelta, const at::Tensor& down1, const at::Tensor& up1,
    const at::Tensor& down2, const at::Tensor& up2, double scale, std::array<bool, 4> needs) {
  check_hada_factors(down1, up1, down2, up2);
  const int64_t O = up1.size(0), I = down1.size(1);
  check_shape(ddelta, "ddelta", {O, I});
  check_like(ddelta, "ddelta", down1);
  const c10::cuda::CUDAGuard guard(down1.device());
  const at::Tensor dw = ddelta.contiguous();
  const std::array<at::Tensor, 4> factors = {down1.contiguous(), up1.contiguous(),
                                             down2.contiguous(), up2.contiguous()};
  std::array<at::Tensor, 4> grads;
  for (int n = 0; n < 4; ++n) grads[n] = make_grad(factors[n], needs[n], dw.numel() > 0);
  if (dw.numel() == 0) return {grads[0], grads[1], grads[2], grads[3]};

  // many tiles: a block takes more of them, and partial results stay small beside ddelta
  int64_t span = 1;
  while (ceil_div(O, span * kHadaTile) * ceil_div(I, span * kHadaTile) > kBlocks) span *= 2;
  const int64_t blocks_O = ceil_div(O, span * kHadaTile), blocks_I = ceil_div(I, span * kHadaTile);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dw.scalar_type(), "hada_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto wide = dw.options().dtype(c10::CppTypeToScalarType<acc_t>::value);
    for (int pair : {0, 2}) {
      const at::Tensor &down = factors[pair], &up = factors[pair + 1], &other = factors[2 - pair],
                       &other_up = factors[3 - pair];
      const bool need_down = needs[pair], need_up = needs[pair + 1];
      if (!need_down && !need_up) continue;
      at::Tensor down_parts = at::empty({need_down ? blocks_O : 0, down.size(0), I}, wide);
      at::Tensor up_parts = at::empty({need_up ? blocks_I : 0, O, up.size(1)}, wide);
      launch(&hada_delta_bwd_kernel<scalar_t, acc_t>, blocks_O * blocks_I, kHadaThreads,
             kHadaBackwardShared * sizeof(acc_t),
             need_down ? down_parts.mutable_data_ptr<acc_t>() : nullptr,
             need_up ? up_parts.mutable_data_ptr<acc_t>() : nullptr, dw.const_data_ptr<scalar_t>(),
             down.const_data_ptr<scalar_t>(), up.const_data_ptr<scalar_t>(),
             other.const_data_ptr<scalar_t>(), other_up.const_data_ptr<scalar_t>(), scale, O, I,
             down.size(0), other.size(0), span);
      if (need_down) sum_parts<scalar_t, acc_t>(grads[pair], down_parts);
      if (need_up) sum_parts<scalar_t, acc_t>(grads[pair + 1], up_parts);
    }
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("hada_delta_fwd_cuda", &lorakern::hada_delta_fwd_cuda);
  m.def("hada_delta_bwd_cuda", &lorakern::hada_delta_bwd_cuda);
}
