// hada_linear with its gradient as one call (four_factors_autograd.h).

#include <torch/library.h>

#include "four_factors_autograd.h"

namespace lorakern {
namespace {

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

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("hada_linear_cpu", &lorakern::FourFactors<lorakern::Hada>::call);
}
