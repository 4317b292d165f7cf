// The kernels of lora_linear_shared on CPU.

#pragma once

#include "../shared_layers.h"

namespace lorakern {

// ys[j] [..., O] and h [..., S] are written
void shared_forward(const at::Tensor& x, const SharedLayers& layers, std::vector<at::Tensor>& ys,
                    at::Tensor& h);

SharedGradients shared_backward(const at::Tensor& x, const at::Tensor& h,
                                const std::vector<at::Tensor>& dys, const SharedLayers& layers,
                                const std::vector<bool>& needs);

}  // namespace lorakern
