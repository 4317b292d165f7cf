// lora_linear with its gradient as one call: the two kernels of lora_linear.cpp in a C++ autograd
// node, which costs a small layer a third of what a Python one does.
//
// y = gain ∘ (x weightᵀ + scale · (x downᵀ) upᵀ) + bias; x, down, up and gain get gradients. Saved:
// x, h [M, R].

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
                            const at::Tensor& up, const std::optional<at::Tensor>& gain,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            double scale) {
    auto [y, h] = lora_linear_fwd_cpu(x, weight, bias, down, up, scale, gain);
    ctx->save_for_backward({x, h, weight, down, up, gain.value_or(at::Tensor())});
    ctx->saved_data["scale"] = scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto gain = saved[5].defined() ? std::optional(saved[5]) : std::nullopt;
    const std::array<bool, 4> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                       ctx->needs_input_grad(2),
                                       gain && ctx->needs_input_grad(3)};
    auto [dx, ddown, dup, dgain] =
        lora_linear_bwd_cpu(dy[0].contiguous(), saved[0], saved[1], saved[2], saved[3], saved[4],
                            ctx->saved_data["scale"].toDouble(), gain, needs);
    variable_list grads = {dx, ddown, dup, dgain, {}, {}, {}};
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
                           const at::Tensor& up, double scale,
                           const std::optional<at::Tensor>& gain) {
  return LoraLinear::apply(x, down, up, gain, weight, bias, scale);
}

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) { m.def("lora_linear_cpu", &lorakern::lora_linear_cpu); }
