// kron_linear with its gradient as one call (four_factors_autograd.h).

#include <torch/library.h>

#include "four_factors_autograd.h"

namespace lorakern {
namespace {

struct Kron {
  static constexpr auto kName = "kron_linear";
  static constexpr auto fwd = kron_linear_fwd_cpu;
  static constexpr auto bwd = kron_linear_bwd_cpu;
};

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_linear_cpu", &lorakern::FourFactors<lorakern::Kron>::call);
}
