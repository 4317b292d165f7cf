// The layers of a call of lora_linear_shared, checked.

#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"

namespace lorakern {

// The layers that share x: weights [O, I], biases [O] or undefined, downs [R, I] and ups [O, R].
struct SharedLayers {
  std::vector<at::Tensor> weights, biases, downs, ups;
  std::vector<double> scales;

  SharedLayers(at::TensorList weights_, const c10::List<std::optional<at::Tensor>>& biases_,
               at::TensorList downs_, at::TensorList ups_, at::ArrayRef<double> scales_)
      : scales(scales_.vec()) {
    const size_t n = weights_.size();
    TORCH_CHECK_VALUE(n > 0 && biases_.size() == n && downs_.size() == n && ups_.size() == n &&
                          scales.size() == n,
                      "want a weight, bias, down, up and scale for each of at least one layer, got ",
                      n, ", ", biases_.size(), ", ", downs_.size(), ", ", ups_.size(), " and ",
                      scales.size());
    for (size_t j = 0; j < n; ++j) {
      const std::optional<at::Tensor> bias = biases_.get(j);
      weights.push_back(weights_[j].contiguous());
      biases.push_back(bias ? bias->contiguous() : at::Tensor());
      downs.push_back(downs_[j].contiguous());
      ups.push_back(ups_[j].contiguous());
    }
  }

  size_t size() const { return weights.size(); }

  // S, the columns of h
  int64_t ranks() const {
    int64_t sum = 0;
    for (const at::Tensor& down : downs) sum += down.size(0);
    return sum;
  }

  at::ScalarType factors() const { return downs[0].scalar_type(); }

  // raises unless each layer takes x; wide: with factors that may be float32 beside 16-bit
  void check(const at::Tensor& x, bool wide) const {
    check_contiguous(x, "x");
    TORCH_CHECK_VALUE(x.dim() > 0, "x: want [..., I], got a scalar");
    const int64_t I = x.size(-1);
    const auto of_factors = wide && factors() == at::kFloat ? at::kFloat : x.scalar_type();
    for (size_t j = 0; j < size(); ++j) {
      const int64_t O = weights[j].size(0), R = downs[j].size(0);
      check_shape(weights[j], "weight", {O, I});
      check_shape(downs[j], "down", {R, I});
      check_shape(ups[j], "up", {O, R});
      check_like(weights[j], "weight", x);
      check_like(downs[j], "down", x, of_factors);
      check_like(ups[j], "up", x, of_factors);
      if (!biases[j].defined()) continue;
      check_shape(biases[j], "bias", {O});
      check_like(biases[j], "bias", x);
    }
  }
};

// x with this last dimension
inline at::Tensor rows_like(const at::Tensor& x, int64_t columns) {
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  return at::empty(sizes, x.options());
}

// Undefined is what is not wanted; needs as the op's.
struct SharedGradients {
  at::Tensor dx;
  std::vector<at::Tensor> ddowns, dups;
};

// What is wanted, each as make(the tensor that it is the gradient of)
template <typename Make>
SharedGradients make_gradients(const at::Tensor& x, const SharedLayers& layers,
                               const std::vector<bool>& needs, const Make& make) {
  const size_t n = layers.size();
  SharedGradients grads;
  if (needs[0]) grads.dx = make(x);
  for (size_t j = 0; j < n; ++j) {
    grads.ddowns.push_back(needs[1 + j] ? make(layers.downs[j]) : at::Tensor());
    grads.dups.push_back(needs[1 + n + j] ? make(layers.ups[j]) : at::Tensor());
  }
  return grads;
}

}  // namespace lorakern
