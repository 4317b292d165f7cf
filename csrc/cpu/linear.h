// What the launchers of the adapted linear layers share: their operands as the products take them.

#pragma once

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <optional>

#include "../check.h"
#include "add_update.h"
#include "block_product.h"
#include "few_rows.h"

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

// Whether torch multiplies float32 by MKL on Intel's cores, where MKL is at its best.
inline bool fast_torch() {
#if defined(__x86_64__)
  static const bool intel = at::hasMKL() && __builtin_cpu_is("intel");
  return intel;
#else
  return false;
#endif
}

// Whether the base product a W is torch's and the update is added in place, of M rows of a and a
// weight of K · N values. Only in float32, where nothing is rounded in between; float64 is ours, for
// there torch starts the sum from the bias on some cores, with up to 1.75 times the error. Few rows do
// not repay packing a large weight, and in backward, where torch packs it too, half as many. On Intel's
// cores torch's product is the faster one unless the weight is small, of at most 256 x 256, or somewhat
// more where a core keeps all of a at hand.
inline bool by_torch(const at::Tensor& a, int64_t M, int64_t K, int64_t N, bool backward) {
  if (a.scalar_type() != at::kFloat) return false;
  if (fast_torch()) return K * N >= (M * K * a.element_size() > kFewBytes ? 3 << 15 : 1 << 17);
  return M <= (backward ? 128 : 256) && K * N >= 1 << 19;
}

// out = a W, or a W + bias, or out + a W: torch's product, or where it is not at its best and rows are
// few (few_rows.h) ours
inline void torch_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& w,
                          const at::Tensor& bias = {}, bool add = false) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t K = w.size(0), N = w.size(1), M = a.numel() / K;
  at::Tensor out_MN = out.view({M, N});
  const at::Tensor a_MK = a.view({M, K});
  const bool transposed = !w.is_contiguous();
  if (!fast_torch() && M > 1 && M <= kFewRows && a.scalar_type() == at::kFloat &&
      a_MK.is_contiguous() && (!transposed || w.t().is_contiguous())) {
    float* const to = out.mutable_data_ptr<float>();
    const FewRows p{M, K, N, data<float>(a), data<float>(w), data_or_null<float>(bias),
                    add ? to : nullptr, to};
    return transposed ? few_rows_transposed(p) : few_rows_plain(p);
  }
  if (!add && !bias.defined()) {
    at::mm_out(out_MN, a_MK, w);
  } else {
    at::addmm_out(out_MN, add ? out_MN : bias, a_MK, w);
  }
}

// bytes of a changed weight that are made at a time, and go through L3
constexpr int64_t kRowsBytes = 4 << 20;

// out = (gain ∘ a) W, with a gain of the rows of W: on a where that is the smaller one
inline void torch_product_of_gained(const at::Tensor& out, const at::Tensor& a, const at::Tensor& w,
                                    const at::Tensor& gain) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (a.nbytes() <= std::min<size_t>(kRowsBytes, w.nbytes()))
    return torch_product(out, a * gain, w);
  const int64_t K = w.size(0);
  const int64_t most = std::clamp<int64_t>(kRowsBytes / (w.size(1) * w.element_size()), 1, K);
  const at::Tensor a_MK = a.view({-1, K});
  for (int64_t k = 0; k < K; k += most) {
    const int64_t some = std::min(most, K - k);
    const at::Tensor gained = w.narrow(0, k, some) * gain.narrow(0, k, some).unsqueeze(1);
    torch_product(out, a_MK.narrow(1, k, some), gained, {}, k > 0);
  }
}

// block_product, or the update alone where torch_product was before
template <typename Op>
void run_product(Op& op, const Rows& rows, bool adds) {
  if constexpr (std::is_same_v<typename Op::scalar_t, float>) {
    if (adds) return add_update(op, rows);
  }
  block_product(op, rows);
}

}  // namespace lorakern
