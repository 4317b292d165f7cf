// The Python module: the ops that a layer calls at every step, as functions; see backend.whole.
//
// torch.ops boxes each argument and looks each up in the schema, which costs a small layer more than
// its arithmetic. Here they go to the dispatcher as they are, so that the tracer and the profiler see
// the op all the same.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>

namespace {

using T = const at::Tensor&;
using Maybe = const std::optional<at::Tensor>&;

template <typename... Args>
void define(pybind11::module_& m, const char* name) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow((std::string("lorakern_native::") + name).c_str(), "")
                      .typed<at::Tensor(Args...)>();
  m.def(name, torch::wrap_pybind_function_no_gil([op](Args... args) { return op.call(args...); }));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  define<T, T, Maybe>(m, "frozen_linear_cpu");
  define<T, T, Maybe, T, T, double, Maybe, bool>(m, "lora_linear_cpu");
  for (const char* name : {"hada_linear_cpu", "kron_linear_cpu"})
    define<T, T, Maybe, T, Maybe, T, Maybe, double, Maybe>(m, name);
}
