// frozen_linear on CPU, of few rows. Spec: lorakern/ops/frozen_linear/reference.py
//
// torch's products copy the weight into panels, or read it with a stride; here it is read once, as it
// lies in memory (few_rows.h).

#include <torch/library.h>

#include "few_rows.h"
#include "linear.h"
#include "../once.h"

namespace lorakern {
namespace {

void check_matrix(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "want weight [O, I], got ", weight.sizes());
}

// room for a [..., K] times W with N columns
at::Tensor few(const at::Tensor& a, const char* name, int64_t K, int64_t N,
               const at::Tensor& weight) {
  TORCH_CHECK_VALUE(a.dim() > 0 && a.size(-1) == K, "want ", name, " [..., ", K, "], got ",
                    a.sizes());
  TORCH_CHECK_VALUE(a.scalar_type() == at::kFloat && K > 0 && N > 0 && a.numel() > 0 &&
                        rows_in(a) <= kFewRows,
                    "want ", name, " of 1 to ", kFewRows, " rows in float32, got ", a.sizes(), " ",
                    a.scalar_type());
  check_contiguous(a, name);
  check_contiguous(weight, "weight");
  check_like(weight, "weight", a);
  auto sizes = a.sizes().vec();
  sizes.back() = N;
  return at::empty(sizes, a.options());
}

at::Tensor frozen_linear_fwd_cpu(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias) {
  check_matrix(weight);
  const int64_t O = weight.size(0), I = weight.size(1);
  const at::Tensor y = few(x, "x", I, O, weight), b = row_vector(bias, "bias", O, x);
  few_rows_transposed({rows_in(x), I, O, data<float>(x), data<float>(weight),
                       data_or_null<float>(b), nullptr, y.mutable_data_ptr<float>()});
  return y;
}

at::Tensor frozen_linear_bwd_cpu(const at::Tensor& dy, const at::Tensor& weight) {
  check_matrix(weight);
  const int64_t O = weight.size(0), I = weight.size(1);
  const at::Tensor dx = few(dy, "dy", O, I, weight);
  few_rows_plain({rows_in(dy), O, I, data<float>(dy), data<float>(weight), nullptr, nullptr,
                  dx.mutable_data_ptr<float>()});
  return dx;
}

// Both directions as one autograd node, which costs a small layer a third of what a Python one does.
struct FrozenLinear : torch::autograd::Function<FrozenLinear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({weight});
    return frozen_linear_fwd_cpu(x, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& dy) {
    const at::Tensor weight = ctx->get_saved_variables()[0];
    return once({frozen_linear_bwd_cpu(dy[0].contiguous(), weight), {}, {}}, "frozen_linear");
  }
};

at::Tensor frozen_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(!weight.requires_grad() && !(bias && bias->requires_grad()),
                    "weight and bias are frozen here");
  return FrozenLinear::apply(x.contiguous(), weight.contiguous(), bias);
}

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("frozen_linear_fwd_cpu", &lorakern::frozen_linear_fwd_cpu);
  m.def("frozen_linear_bwd_cpu", &lorakern::frozen_linear_bwd_cpu);
  m.def("frozen_linear_cpu", &lorakern::frozen_linear_cpu);
  m.def("fast_torch", [] { return lorakern::fast_torch(); });
}
