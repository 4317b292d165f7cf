// lora_linear with its gradient as one call: the two kernels of lora_linear.cpp in a C++ autograd
// node, which costs a small layer a third of what a Python one does.
//
// y = gain ∘ (x weightᵀ + scale · (x downᵀ) upᵀ) + bias; x, down, up and gain get gradients. Saved:
// h [M, R], and x unless down is frozen. Where a gain trains, y before gain and bias too, or backward
// would cost half a layer more.

#include <ATen/ops/empty.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "gain.h"
#include "linear.h"
#include "lora_linear.h"
#include "once.h"

namespace lorakern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// dgain from the sums that forward kept
at::Tensor gain_gradient_cpu(const at::Tensor& kept, const at::Tensor& dy) {
  const int64_t O = dy.size(-1), M = rows_in(dy);
  at::Tensor dgain = at::zeros({O}, wide_options(dy));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dy.scalar_type(), "gain", [&] {
    if (M > 0)
      gain_gradient(data<scalar_t>(kept), data<scalar_t>(dy), M, O,
                    dgain.mutable_data_ptr<at::opmath_type<scalar_t>>());
  });
  return dgain;
}

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  // what gets a gradient comes first: needs_input_grad counts tensors
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& down,
                            const at::Tensor& up, const std::optional<at::Tensor>& gain,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            double scale, bool keep) {
    auto [y, h, kept] =
        lora_linear_keeping_cpu(x, weight, bias, down, up, scale, gain, keep);
    // a frozen down asks x for no more than its shape
    ctx->save_for_backward({down.requires_grad() ? x : at::Tensor(), h, weight, down, up,
                            gain.value_or(at::Tensor()), kept});
    ctx->saved_data["scale"] = scale;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto gain = saved[5].defined() ? std::optional(saved[5]) : std::nullopt;
    const bool need_dgain = gain && ctx->needs_input_grad(3);
    const std::array<bool, 4> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                       ctx->needs_input_grad(2), false};
    auto sizes = dy[0].sizes().vec();
    sizes.back() = saved[2].size(1);
    const at::Tensor x = saved[0].defined() ? saved[0] : at::empty(sizes, dy[0].options());
    const at::Tensor grad = dy[0].contiguous();
    auto [dx, ddown, dup, none] =
        lora_linear_bwd_cpu(grad, x, saved[1], saved[2], saved[3], saved[4],
                            ctx->saved_data["scale"].toDouble(), gain, needs);
    const at::Tensor dgain = need_dgain ? gain_gradient_cpu(saved[6], grad) : at::Tensor();
    variable_list grads = {dx, ddown, dup, dgain, {}, {}, {}, {}};
    for (size_t i = 0; i < 3; ++i) {
      if (!needs[i]) grads[i] = at::Tensor();
    }
    return once(std::move(grads), "lora_linear");
  }
};

at::Tensor lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& down,
                           const at::Tensor& up, double scale,
                           const std::optional<at::Tensor>& gain) {
  const bool keep = gain && gain->requires_grad() && at::GradMode::is_enabled();
  return LoraLinear::apply(x, down, up, gain, weight, bias, scale, keep);
}

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) { m.def("lora_linear_cpu", &lorakern::lora_linear_cpu); }
