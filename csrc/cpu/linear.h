// What the launchers of the adapted linear layers share: their operands as the products take them.

#pragma once

#include <optional>

#include "../check.h"
#include "block_product.h"

namespace lorakern {

template <typename scalar_t>
const scalar_t* data(const at::Tensor& t) {
  return t.const_data_ptr<scalar_t>();
}

// rows of x [..., I]
inline int64_t rows_in(const at::Tensor& x) {
  return x.numel() / std::max<int64_t>(x.size(-1), 1);
}

// a vector of one value an output, or an undefined tensor
inline at::Tensor row_vector(const std::optional<at::Tensor>& v, const char* name, int64_t O,
                             const at::Tensor& x) {
  if (!v) return at::Tensor();
  check_shape(*v, name, {O});
  check_like(*v, name, x);
  return v->contiguous();
}

// the dtype of the sums over tensors of this one
inline at::TensorOptions wide_options(const at::Tensor& x) {
  return x.options().dtype(at::toOpMathType(x.scalar_type()));
}

// a gain is in the dtype of the sums: one near 1 is lost in 16-bit
inline at::Tensor row_gain(const std::optional<at::Tensor>& gain, int64_t O, const at::Tensor& x) {
  if (!gain) return at::Tensor();
  check_shape(*gain, "gain", {O});
  check_like(*gain, "gain", x, at::toOpMathType(x.scalar_type()));
  return gain->contiguous();
}

template <typename scalar_t>
const scalar_t* data_or_null(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr;
}

// y = gain ∘ (x weightᵀ + (x downᵀ) upᵀ) + bias; down, up, bias, gain and y may be undefined
template <typename scalar_t>
LowRank<scalar_t> forward_product(const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& bias, const at::Tensor& down,
                                  const at::Tensor& up, const at::Tensor& y,
                                  const at::Tensor& gain) {
  return {rows_in(x),
          weight.size(1),
          weight.size(0),
          down.defined() ? down.size(0) : 0,
          data<scalar_t>(x),
          data<scalar_t>(weight),
          data_or_null<scalar_t>(down),
          data_or_null<scalar_t>(up),
          data_or_null<scalar_t>(bias),
          true,
          y.defined() ? y.mutable_data_ptr<scalar_t>() : nullptr,
          x.options(),
          data_or_null<at::opmath_type<scalar_t>>(gain)};
}

// Few rows do not repay packing a large weight, and in backward, where torch packs it too, half as
// many: then torch's own products, and the update added in place. Only where a sum is as wide as a
// result, so that nothing is rounded in between. On cores with AMX, which are Intel's, torch's
// product is the faster one of weights that are not small, up to rows whose second pass costs more.
#if defined(LORAKERN_AMX)
constexpr int64_t kFewRows = 1024, kFewRowsBackward = 1024, kLargeWeight = 1 << 17;
#else
constexpr int64_t kFewRows = 256, kFewRowsBackward = 128, kLargeWeight = 1 << 19;
#endif

// whether a result is as wide as a sum
inline bool is_wide(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
}

inline bool few_rows(const at::Tensor& x, int64_t M, int64_t weight_size,
                     int64_t few = kFewRows) {
  return is_wide(x) && M <= few && weight_size >= kLargeWeight;
}

}  // namespace lorakern
