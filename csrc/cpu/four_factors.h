// hada_linear and kron_linear on CPU, as their launchers and their autograd node call them.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace lorakern {

using SixTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor hada_linear_fwd_cpu(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& down1,
                               const at::Tensor& up1, const at::Tensor& down2,
                               const at::Tensor& up2, double scale,
                               const std::optional<at::Tensor>& gain);

SixTensors hada_linear_bwd_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& down1, const at::Tensor& up1,
                               const at::Tensor& down2, const at::Tensor& up2, double scale,
                               const std::optional<at::Tensor>& gain, std::array<bool, 6> needs);

at::Tensor kron_linear_fwd_cpu(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& c_up,
                               const std::optional<at::Tensor>& c_down, const at::Tensor& d_up,
                               const std::optional<at::Tensor>& d_down, double scale,
                               const std::optional<at::Tensor>& gain);

SixTensors kron_linear_bwd_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& c_up, const std::optional<at::Tensor>& c_down,
                               const at::Tensor& d_up, const std::optional<at::Tensor>& d_down,
                               double scale, const std::optional<at::Tensor>& gain,
                               std::array<bool, 6> needs);

}  // namespace lorakern
