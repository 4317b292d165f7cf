// lora_linear with its gradient as one call: the two kernels of lora_linear.cpp in a C++ autograd
// node, which costs a small layer a third of what a Python one does.
//
// y = x weightᵀ + bias + scale · (x downᵀ) upᵀ; x, down and up get gradients. Saved: x, h [M, R].

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include "lora_linear.h"

namespace lorakern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  // what gets a gradient comes first: needs_input_grad counts tensors
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& down,
                            const at::Tensor& up, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, double scale) {
    auto [y, h] = lora_linear_fwd_cpu(x, weight, bias, down, up, scale);
    ctx->save_for_backward({x, h, weight, down, up});
    ctx->saved_data["scale"] = scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const std::array<bool, 3> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                       ctx->needs_input_grad(2)};
    auto [dx, ddown, dup] =
        lora_linear_bwd_cpu(dy[0].contiguous(), saved[0], saved[1], saved[2], saved[3], saved[4],
                            ctx->saved_data["scale"].toDouble(), needs);
    variable_list grads = {dx, ddown, dup, {}, {}, {}};
    for (size_t i = 0; i < needs.size(); ++i) {
      if (!needs[i]) grads[i] = at::Tensor();
    }
    return at::GradMode::is_enabled() ? once(std::move(grads)) : grads;
  }

  // grads that raise when they are differentiated in turn
  static variable_list once(variable_list grads) {
    for (auto& grad : grads) {
      if (grad.defined()) grad = grad.detach().set_requires_grad(true);
    }
    const auto raises = std::make_shared<torch::autograd::DelayedError>(
        "lora_linear is differentiable once: its backward has no gradient", grads.size());
    return (*raises)(std::move(grads));
  }
};

at::Tensor lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& down,
                           const at::Tensor& up, double scale) {
  return LoraLinear::apply(x, down, up, weight, bias, scale);
}

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) { m.def("lora_linear_cpu", &lorakern::lora_linear_cpu); }
