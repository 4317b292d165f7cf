// lora_linear on CPU. Spec: lorakern/ops/lora_linear/reference.py
//
// The plain-torch spec writes the base product, reads it back for the update, and reads dy and x
// once for each product that needs them. Here a block of rows stays in cache for all of its
// products (low_rank.h), 16-bit sums stay in float32 until the one rounding, and the gradients of
// the factors are summed by thread, then over threads in order.

#include "lora_linear.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "low_rank.h"

namespace lorakern {
namespace {

template <typename scalar_t, bool kPairs>
void forward(const LowRank<scalar_t>& p, scalar_t* h, double scale) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t Rp = padded<acc_t>(p.R);
  const Rows rows(p.M, kPairs ? p.K / 2 : p.K, sizeof(acc_t), p.M * p.N * p.K);
  low_rank_product<scalar_t, kPairs>(p, rows, [&](int64_t, int64_t row, int64_t count, acc_t* t) {
    for (int64_t i = 0; i < count; ++i)
      narrow<scalar_t, acc_t>(h + (row + i) * p.R, t + i * Rp, nullptr, p.R);
    for (int64_t i = 0; i < count * Rp; ++i) t[i] *= static_cast<acc_t>(scale);
  });
}

template <typename scalar_t, bool kPairs>
void backward(LowRank<scalar_t> p, const scalar_t* x, const scalar_t* h, int64_t O, int64_t I,
              double scale, scalar_t* ddown, scalar_t* dup) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t R = p.R;
  // neither dx nor ddown: no need of dh
  if (p.N == 0 && !ddown) p.R = 0;
  const int64_t Rp = padded<acc_t>(p.R);
  const Rows rows(p.M, kPairs ? p.K / 2 : p.K, sizeof(acc_t), p.M * O * I);
  const int64_t ddown_size = ddown ? R * padded<acc_t>(I) : 0;
  const int64_t dup_size = dup ? R * padded<acc_t>(O) : 0;
  const int64_t factor_size = rows.block * R;
  const int64_t slot_size = ddown_size + dup_size + rows.block * kPanel<acc_t> + 2 * factor_size;
  at::Tensor scratch =
      at::empty({rows.slots * slot_size}, p.options.dtype(c10::CppTypeToScalarType<acc_t>::value));
  acc_t* const sums = scratch.template mutable_data_ptr<acc_t>();

  low_rank_product<scalar_t, kPairs>(
      p, rows, [&](int64_t slot, int64_t row, int64_t count, acc_t* t) {
        const bool add = row > slot * rows.per_slot;
        acc_t* const slot_sums = sums + slot * slot_size;
        acc_t* const panel = slot_sums + ddown_size + dup_size;
        acc_t* const factor = panel + rows.block * kPanel<acc_t>;
        for (int64_t i = 0; i < count * Rp; ++i) t[i] *= static_cast<acc_t>(scale);
        if (ddown) {
          const acc_t* dh = t;
          int64_t ld = Rp;
          if constexpr (kPairs) {
            auto* rounded = reinterpret_cast<scalar_t*>(factor + factor_size);
            for (int64_t i = 0; i < count; ++i)
              narrow<scalar_t, acc_t>(rounded + i * R, t + i * Rp, nullptr, R);
            pack_row_pairs(factor, R, rounded, R, R, count);
            dh = factor;
            ld = R;
          }
          add_outer<kPairs>(slot_sums, add, dh, ld, R, x + row * I, I, count, panel);
        }
        if (dup) {
          if constexpr (kPairs) {
            pack_row_pairs(factor, R, h + row * R, R, R, count);
          } else {
            widen(factor, h + row * R, count * R);
          }
          add_outer<kPairs>(slot_sums + ddown_size, add, factor, R, R, p.a + row * O, O, count,
                            panel);
        }
      });

  const auto total = [&](const acc_t* first) {
    acc_t sum = 0;
    for (int64_t slot = 0; slot < rows.slots; ++slot) sum += first[slot * slot_size];
    return sum;
  };
  if (ddown) {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t i = 0; i < I; ++i)
        ddown[r * I + i] = static_cast<scalar_t>(total(sums + r * padded<acc_t>(I) + i));
  }
  if (dup) {
    for (int64_t o = 0; o < O; ++o)
      for (int64_t r = 0; r < R; ++r)
        dup[o * R + r] = static_cast<scalar_t>(static_cast<acc_t>(scale) *
                                               total(sums + ddown_size + r * padded<acc_t>(O) + o));
  }
}

// bfloat16 pairs are multiplied as they are when a row holds a whole number of them
template <typename scalar_t, typename Run>
void with_pairs(int64_t k, const Run& run) {
  if constexpr (kHasPairs && std::is_same_v<scalar_t, at::BFloat16>) {
    if (k % 2 == 0) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <typename scalar_t>
const scalar_t* data(const at::Tensor& t) {
  return t.const_data_ptr<scalar_t>();
}

// Few rows do not repay packing a large weight: then torch's own products, and the update added in
// place. Only where a sum is as wide as a result, so that nothing is rounded in between.
constexpr int64_t kFewRows = 256;
constexpr int64_t kLargeWeight = 1 << 19;

bool few_rows(const at::Tensor& x, int64_t M, int64_t weight_size) {
  const bool wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
  return wide && M <= kFewRows && weight_size >= kLargeWeight;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_fwd_cpu(const at::Tensor& x,
                                                       const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias,
                                                       const at::Tensor& down, const at::Tensor& up,
                                                       double scale) {
  const int64_t I = x.size(-1), O = weight.size(0), R = down.size(0),
                M = x.numel() / std::max<int64_t>(I, 1);
  check_shape(weight, "weight", {O, I});
  check_shape(down, "down", {R, I});
  check_shape(up, "up", {O, R});
  check_contiguous(x, "x");
  const at::Tensor w = weight.contiguous(), d = down.contiguous(), u = up.contiguous();
  for (const auto& [t, name] : {std::pair{&w, "weight"}, {&d, "down"}, {&u, "up"}})
    check_like(*t, name, x);
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  if (bias) {
    check_shape(b, "bias", {O});
    check_like(b, "bias", x);
  }

  auto sizes = x.sizes().vec();
  sizes.back() = O;
  at::Tensor y = at::empty(sizes, x.options());
  sizes.back() = R;
  at::Tensor h = at::empty(sizes, x.options());
  if (M == 0) return {y, h};
  if (few_rows(x, M, O * I)) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::Tensor x_MI = x.view({M, I});
    at::Tensor y_MO = y.view({M, O}), h_MR = h.view({M, R});
    at::mm_out(h_MR, x_MI, d.t());
    bias ? at::addmm_out(y_MO, b, x_MI, w.t()) : at::mm_out(y_MO, x_MI, w.t());
    at::addmm_out(y_MO, y_MO, h_MR, u.t(), 1, scale);
    return {y, h};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    const LowRank<scalar_t> p{M,
                              I,
                              O,
                              R,
                              data<scalar_t>(x),
                              data<scalar_t>(w),
                              data<scalar_t>(d),
                              data<scalar_t>(u),
                              bias ? data<scalar_t>(b) : nullptr,
                              true,
                              y.mutable_data_ptr<scalar_t>(),
                              x.options()};
    with_pairs<scalar_t>(I, [&](auto pairs) {
      forward<scalar_t, pairs.value>(p, h.mutable_data_ptr<scalar_t>(), scale);
    });
  });
  return {y, h};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& h, const at::Tensor& weight,
    const at::Tensor& down, const at::Tensor& up, double scale, std::array<bool, 3> needs) {
  const int64_t I = weight.size(1), O = weight.size(0), R = down.size(0),
                M = dy.numel() / std::max<int64_t>(O, 1);
  check_shape(down, "down", {R, I});
  check_shape(up, "up", {O, R});
  const at::Tensor w = weight.contiguous(), d = down.contiguous(), u = up.contiguous();
  for (const auto& [t, name] : {std::pair{&dy, "dy"}, {&x, "x"}, {&h, "h"}})
    check_contiguous(*t, name);
  for (const auto& [t, name] :
       {std::pair{&dy, "dy"}, {&h, "h"}, {&w, "weight"}, {&d, "down"}, {&u, "up"}})
    check_like(*t, name, x);
  TORCH_CHECK_VALUE(x.numel() == M * I && h.numel() == M * R, "want x [..., ", I, "] and h [..., ",
                    R, "] of ", M, " rows as dy, got ", x.sizes(), " and ", h.sizes());

  const auto [need_dx, need_ddown, need_dup] = needs;
  at::Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  if (M == 0) {
    return {dx, at::zeros(need_ddown ? down.sizes() : at::IntArrayRef{0}, x.options()),
            at::zeros(need_dup ? up.sizes() : at::IntArrayRef{0}, x.options())};
  }
  at::Tensor ddown = at::empty(need_ddown ? down.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor dup = at::empty(need_dup ? up.sizes() : at::IntArrayRef{0}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    const LowRank<scalar_t> p{M,
                              O,
                              need_dx ? I : 0,
                              R,
                              data<scalar_t>(dy),
                              data<scalar_t>(w),
                              data<scalar_t>(u),
                              data<scalar_t>(d),
                              nullptr,
                              false,
                              dx.mutable_data_ptr<scalar_t>(),
                              x.options()};
    with_pairs<scalar_t>(O, [&, need_ddown = need_ddown, need_dup = need_dup](auto pairs) {
      backward<scalar_t, pairs.value>(p, data<scalar_t>(x), data<scalar_t>(h), O, I, scale,
                                      need_ddown ? ddown.mutable_data_ptr<scalar_t>() : nullptr,
                                      need_dup ? dup.mutable_data_ptr<scalar_t>() : nullptr);
    });
  });
  return {dx, ddown, dup};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("lora_linear_fwd_cpu", &lorakern::lora_linear_fwd_cpu);
  m.def("lora_linear_bwd_cpu", &lorakern::lora_linear_bwd_cpu);
}
