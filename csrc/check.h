// Argument checks of the launchers. A message names the tensor, what is wanted, what came.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace lorakern {

inline void check_shape(const at::Tensor& t, const char* name, at::IntArrayRef want) {
  TORCH_CHECK_VALUE(t.sizes() == want, name, ": want shape ", want, ", got ", t.sizes());
}

inline void check_contiguous(const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": want a contiguous tensor, got strides ",
                    t.strides(), " for shape ", t.sizes());
}

inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& x,
                       at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.device() == x.device(), name, ": want ", dtype,
                    " on ", x.device(), ", got ", t.scalar_type(), " on ", t.device());
}

inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& x) {
  check_like(t, name, x, x.scalar_type());
}

}  // namespace lorakern
