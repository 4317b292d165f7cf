// lora_linear with its gradient as one call: the two kernels of lora_linear.cpp in a C++ autograd
// node, which costs a small layer a third of what a Python one does.
//
// y = gain ∘ (x weightᵀ + scale · (x downᵀ) upᵀ) + bias; x, down, up and gain get gradients. Saved:
// h [M, R], and x unless down is frozen. Where a gain trains, y too, which most networks keep anyhow
// and which spares backward a product of half the layer's cost. The layer may be followed by an
// operator that overwrites y: then the product is run again. To recompute is to save x alone.
// Float32 factors beside another x are rounded here.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "gain.h"
#include "linear.h"
#include "lora_linear.h"
#include "../once.h"

namespace lorakern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// dgain from y, or an undefined tensor where y does not tell it
at::Tensor gain_gradient_cpu(const at::Tensor& y, const std::optional<at::Tensor>& bias,
                             const at::Tensor& gain, const at::Tensor& dy) {
  const int64_t O = dy.size(-1);
  const at::Tensor g = row_gain(gain, O, dy), b = row_vector(bias, "bias", O, dy);
  at::Tensor dgain = at::empty({O}, g.options());
  bool told = false;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dy.scalar_type(), "gain", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    told = gain_gradient(data<scalar_t>(y), data_or_null<scalar_t>(b), data<acc_t>(g),
                         data<scalar_t>(dy), rows_in(dy), O, dgain.mutable_data_ptr<acc_t>());
  });
  return told ? dgain : at::Tensor();
}

// The factor in x's dtype, where it is float32; torch's own conversion costs a small layer more than
// its products. What is not on the CPU is left to the kernel to refuse.
at::Tensor rounded(const at::Tensor& factor, const at::Tensor& x) {
  const auto type = x.scalar_type();
  if (factor.scalar_type() != at::kFloat || type == at::kFloat || !factor.is_cpu()) return factor;
  if (type != at::kHalf && type != at::kBFloat16) return factor.to(type);
  const at::Tensor from = factor.contiguous();
  at::Tensor to = at::empty(from.sizes(), from.options().dtype(type));
  AT_DISPATCH_REDUCED_FLOATING_TYPES(type, "rounded", [&] {
    narrow<scalar_t, float>(to.mutable_data_ptr<scalar_t>(), data<float>(from), nullptr,
                            from.numel());
  });
  return to;
}

// How often a tensor had been written to, and whether it was since; it does not hold the tensor.
struct Version : torch::CustomClassHolder {
  explicit Version(const at::Tensor& t)
      : counter(torch::autograd::impl::version_counter(t)), then(counter.current_version()) {}
  bool same() const { return counter.current_version() == then; }
  c10::VariableVersion counter;
  uint32_t then;
};

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  // what gets a gradient comes first: needs_input_grad counts tensors
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& wide_down,
                            const at::Tensor& wide_up, const std::optional<at::Tensor>& gain,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            double scale, bool train_gain, bool recompute) {
    const at::Tensor down = rounded(wide_down, x), up = rounded(wide_up, x);
    auto [y, h] = lora_linear_fwd_cpu(x, weight, bias, down, up, scale, gain);
    // a frozen down asks x for no more than its shape
    const at::Tensor none;
    const bool keep_x = recompute || wide_down.requires_grad() || train_gain;
    const bool keep_y = train_gain && !recompute;
    ctx->save_for_backward({keep_x ? x : none, recompute ? none : h, weight, down, up,
                            gain.value_or(none), keep_y ? bias.value_or(none) : none,
                            keep_y ? y.variable_data() : none});
    ctx->saved_data["scale"] = scale;
    if (keep_y)
      ctx->saved_data["version"] = c10::IValue::make_capsule(c10::make_intrusive<Version>(y));
    return y;
  }

  static std::optional<at::Tensor> given(const at::Tensor& t) {
    return t.defined() ? std::optional(t) : std::nullopt;
  }

  static const Version& version(AutogradContext* ctx) {
    return static_cast<const Version&>(*ctx->saved_data["version"].toCapsule());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    const auto gain = given(saved[5]), bias = given(saved[6]);
    std::array<bool, 4> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                 ctx->needs_input_grad(2), gain && ctx->needs_input_grad(3)};
    auto sizes = dy[0].sizes().vec();
    sizes.back() = saved[2].size(1);
    const at::Tensor x = saved[0].defined() ? saved[0] : at::empty(sizes, dy[0].options());
    const at::Tensor grad = dy[0].contiguous();
    at::Tensor h = saved[1], from_y;
    if (!h.defined()) {
      const at::AutoDispatchBelowADInplaceOrView below;
      h = at::linear(x, saved[3]);
    }
    if (needs[3] && saved[7].defined() && version(ctx).same())
      from_y = gain_gradient_cpu(saved[7], bias, *gain, grad);
    needs[3] = needs[3] && !from_y.defined();
    auto [dx, ddown, dup, dgain] =
        lora_linear_bwd_cpu(grad, x, h, saved[2], saved[3], saved[4],
                            ctx->saved_data["scale"].toDouble(), gain, needs);
    // the engine gives a gradient the dtype of its factor
    variable_list grads = {dx, ddown, dup, needs[3] ? dgain : from_y, {}, {}, {}, {}, {}};
    for (size_t i = 0; i < 3; ++i) {
      if (!needs[i]) grads[i] = at::Tensor();
    }
    return once(std::move(grads), "lora_linear");
  }
};

at::Tensor lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias, const at::Tensor& down,
                           const at::Tensor& up, double scale,
                           const std::optional<at::Tensor>& gain, bool recompute) {
  TORCH_CHECK_VALUE(!weight.requires_grad() && !(bias && bias->requires_grad()),
                    "weight and bias are frozen here");
  const bool train_gain = gain && gain->requires_grad() && at::GradMode::is_enabled();
  return LoraLinear::apply(x.contiguous(), down, up, gain, weight, bias, scale, train_gain,
                           recompute);
}

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) { m.def("lora_linear_cpu", &lorakern::lora_linear_cpu); }
