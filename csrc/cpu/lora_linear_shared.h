// The kernels of lora_linear_shared on CPU, as their launcher and their autograd node call them.

#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <vector>

namespace lorakern {

// The layers that share x: weights [O, I], biases [O] or undefined, downs [R, I] and ups [O, R].
struct SharedLayers {
  std::vector<at::Tensor> weights, biases, downs, ups;
  std::vector<double> scales;

  SharedLayers(at::TensorList weights, const c10::List<std::optional<at::Tensor>>& biases,
               at::TensorList downs, at::TensorList ups, at::ArrayRef<double> scales);
  size_t size() const { return weights.size(); }
  // S, the columns of h
  int64_t ranks() const;
  // raises unless each layer takes x
  void check(const at::Tensor& x) const;
};

// x with this last dimension
at::Tensor rows_like(const at::Tensor& x, int64_t columns);

// ys[j] [..., O] and h [..., S] are written
void shared_forward(const at::Tensor& x, const SharedLayers& layers, std::vector<at::Tensor>& ys,
                    at::Tensor& h);

// Undefined is what is not wanted; needs as the op's.
struct SharedGradients {
  at::Tensor dx;
  std::vector<at::Tensor> ddowns, dups;
};
SharedGradients shared_backward(const at::Tensor& x, const at::Tensor& h,
                                const std::vector<at::Tensor>& dys, const SharedLayers& layers,
                                const std::vector<bool>& needs);

}  // namespace lorakern
