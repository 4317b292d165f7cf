// What the C++ autograd nodes share: a backward that has no gradient of its own.

#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <memory>
#include <string>
#include <utility>

namespace lorakern {

// grads as they are; where a graph of backward is made, ones that raise when they are
// differentiated in turn
inline torch::autograd::variable_list once(torch::autograd::variable_list grads,
                                           const std::string& op) {
  if (!at::GradMode::is_enabled()) return grads;
  for (auto& grad : grads) {
    if (grad.defined()) grad = grad.detach().set_requires_grad(true);
  }
  const auto raises = std::make_shared<torch::autograd::DelayedError>(
      op + " is differentiable once: its backward has no gradient", grads.size());
  return (*raises)(std::move(grads));
}

}  // namespace lorakern
