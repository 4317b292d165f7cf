// lora_linear_shared on CPU as torch ops, and with its gradient as one call.

#include "../lora_linear_shared_autograd.h"

#include <torch/library.h>

#include "lora_linear_shared.h"

namespace {

struct Cpu {
  static constexpr bool kMixed = false;
  static constexpr auto forward = lorakern::shared_forward;
  static constexpr auto backward = lorakern::shared_backward;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("lora_linear_shared_fwd_cpu", &lorakern::lora_linear_shared_fwd<Cpu>);
  m.def("lora_linear_shared_bwd_cpu", &lorakern::lora_linear_shared_bwd<Cpu>);
  m.def("lora_linear_shared_cpu", &lorakern::lora_linear_shared<Cpu>);
}
