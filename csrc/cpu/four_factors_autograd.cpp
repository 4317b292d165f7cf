// The gradient of hada_linear and kron_linear as one call: an op's two kernels in a C++ autograd
// node, which costs a small layer a third of what a Python one does.
//
// x, the factors and the gain get gradients. Saved: x and the factors.

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "four_factors.h"
#include "../check.h"
#include "../once.h"

namespace lorakern {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Maybe = std::optional<at::Tensor>;

Maybe maybe(const at::Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; }

// Op: kName, and fwd and bwd with the signatures of kron_linear
template <typename Op>
struct FourFactors : torch::autograd::Function<FourFactors<Op>> {
  // what gets a gradient comes first
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& a,
                            const Maybe& b, const at::Tensor& c, const Maybe& d, const Maybe& gain,
                            const at::Tensor& weight, const Maybe& bias, double scale) {
    ctx->save_for_backward({x, a, b.value_or(at::Tensor()), c, d.value_or(at::Tensor()),
                            gain.value_or(at::Tensor()), weight});
    ctx->saved_data["scale"] = scale;
    return Op::fwd(x, weight, bias, a, b, c, d, scale, gain);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const auto saved = ctx->get_saved_variables();
    std::array<bool, 6> needs;
    // needs_input_grad counts the tensors that are there
    for (size_t i = 0, at = 0; i < needs.size(); ++i)
      needs[i] = saved[i].defined() && ctx->needs_input_grad(at++);
    auto [dx, da, db, dc, dd, dgain] =
        Op::bwd(dy[0].contiguous(), saved[0], saved[6], saved[1], maybe(saved[2]), saved[3],
                maybe(saved[4]), ctx->saved_data["scale"].toDouble(), maybe(saved[5]), needs);
    variable_list grads = {dx, da, db, dc, dd, dgain, {}, {}, {}};
    for (size_t i = 0; i < needs.size(); ++i) {
      if (!needs[i]) grads[i] = at::Tensor();
    }
    return once(std::move(grads), Op::kName);
  }

  static at::Tensor call(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                         const at::Tensor& a, const Maybe& b, const at::Tensor& c, const Maybe& d,
                         double scale, const Maybe& gain) {
    TORCH_CHECK_VALUE(!weight.requires_grad() && !(bias && bias->requires_grad()),
                      "weight and bias are frozen here");
    TORCH_CHECK_VALUE(x.is_floating_point(), "x: want a floating-point tensor, got ",
                      x.scalar_type());
    for (const at::Tensor& t : {weight, a, b.value_or(a), c, d.value_or(c)})
      TORCH_CHECK_VALUE(t.dim() == 2, "weight and factors: want matrices, got ", t.sizes());
    return FourFactors::apply(x.contiguous(), a, b, c, d, gain, weight, bias, scale);
  }
};

struct Hada {
  static constexpr auto kName = "hada_linear";

  static at::Tensor fwd(const at::Tensor& x, const at::Tensor& weight, const Maybe& bias,
                        const at::Tensor& a, const Maybe& b, const at::Tensor& c, const Maybe& d,
                        double scale, const Maybe& gain) {
    return hada_linear_fwd_cpu(x, weight, bias, a, *b, c, *d, scale, gain);
  }
  static SixTensors bwd(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                        const at::Tensor& a, const Maybe& b, const at::Tensor& c, const Maybe& d,
                        double scale, const Maybe& gain, std::array<bool, 6> needs) {
    return hada_linear_bwd_cpu(dy, x, weight, a, *b, c, *d, scale, gain, needs);
  }
};

struct Kron {
  static constexpr auto kName = "kron_linear";
  static constexpr auto fwd = kron_linear_fwd_cpu;
  static constexpr auto bwd = kron_linear_bwd_cpu;
};

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("hada_linear_cpu", &lorakern::FourFactors<lorakern::Hada>::call);
  m.def("kron_linear_cpu", &lorakern::FourFactors<lorakern::Kron>::call);
}
