// The two kernels of lora_linear on CPU, as their launcher and their autograd node call them.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace lorakern {

std::tuple<at::Tensor, at::Tensor> lora_linear_fwd_cpu(const at::Tensor& x,
                                                       const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias,
                                                       const at::Tensor& down, const at::Tensor& up,
                                                       double scale,
                                                       const std::optional<at::Tensor>& gain);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& h, const at::Tensor& weight,
    const at::Tensor& down, const at::Tensor& up, double scale,
    const std::optional<at::Tensor>& gain, std::array<bool, 4> needs);

}  // namespace lorakern
