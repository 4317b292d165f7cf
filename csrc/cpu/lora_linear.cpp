// lora_linear on CPU. Spec: lorakern/ops/lora_linear/reference.py
//
// The plain-torch spec writes the base product, reads it back for the update, and reads dy and x
// once for each product that needs them. Here a block of rows stays in cache for all of its
// products (block_product.h), 16-bit sums stay in float32 until the one rounding, and the gradients of
// the factors are summed by thread, then over threads in order. Where torch's base product is the
// faster one (linear.h), such a block gets the update alone.

#include "lora_linear.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "factor_sums.h"
#include "gain.h"
#include "linear.h"

namespace lorakern {
namespace {

// y = gain ∘ (a W + scale · t E) + bias and h = t
template <typename scalar_t, bool kPairs>
struct Forward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  double scale;
  // may be null
  scalar_t* h;

  void visit(int64_t, int64_t row, int64_t rows, const acc_t*, acc_t* t) const {
    const int64_t R = this->p.R, Rp = padded<acc_t>(R);
    for (int64_t i = 0; h && i < rows; ++i)
      narrow<scalar_t, acc_t>(h + (row + i) * R, t + i * Rp, nullptr, R);
    for (int64_t i = 0; i < rows * Rp; ++i) t[i] *= static_cast<acc_t>(scale);
  }
};

// The sums of Forward once more, from the h that was kept, or from x where that has 16 bits.
template <typename scalar_t, bool kPairs>
struct Again : Forward<scalar_t, kPairs> {
  using Base = Forward<scalar_t, kPairs>;
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kKept = std::is_same_v<scalar_t, acc_t>;
  const scalar_t* kept;

  int64_t shrinks() const { return kKept ? 0 : Base::shrinks(); }
  void shrink(acc_t* t, const acc_t* a, const acc_t* shrink, int64_t row, int64_t rows) const {
    if (!kKept) return Base::shrink(t, a, shrink, row, rows);
    const int64_t R = this->p.R, Rp = padded<acc_t>(R);
    for (int64_t i = 0; i < rows; ++i) {
      widen(t + i * Rp, kept + (row + i) * R, R);
      std::fill(t + i * Rp + R, t + (i + 1) * Rp, acc_t(0));
    }
  }
};

// dx = dy W + scale · t E, t = dy up, and the gradients of the factors. A gain is in the rows of W
// and up; in pairs, each of these is then the sum of two bfloat16 parts.
template <typename scalar_t, bool kPairs>
struct Backward : Block<scalar_t, kPairs> {
  using Base = Block<scalar_t, kPairs>;
  using acc_t = at::opmath_type<scalar_t>;
  double scale;
  FactorSums<scalar_t, kPairs> factors;

  int64_t parts() const { return kPairs && this->p.gain ? 2 : 1; }
  int64_t lanes() const { return parts() * Base::lanes(); }
  void pack(acc_t* panel, int64_t first, int64_t width) const {
    if (parts() == 1) return Base::pack(panel, first, width);
    pack_parts(panel, this->p.wide, this->p.N, first, width);
  }
  void pack_shrink(acc_t* shrink, int64_t i) const {
    if (parts() == 1) return Base::pack_shrink(shrink, i);
    const int64_t first = i * kPanel<acc_t>;
    pack_parts(shrink + first * lanes(), this->p.shrink, this->p.R, first,
               width_of<acc_t>(this->p.R - first));
  }
  // a panel of gain ∘ src[K, cols]: one part, and below it the other
  void pack_parts(acc_t* panel, const scalar_t* src, int64_t cols, int64_t first,
                  int64_t width) const {
    if constexpr (kPairs) {
      const int64_t K = this->p.K;
      std::vector<acc_t> sums(K * width);
      pack_rows(sums.data(), width, src + first, cols, std::min(width, cols - first), K);
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < width; ++j) sums[k * width + j] *= this->p.gain[k];
      for (int part = 0; part < 2; ++part)
        take_row_pairs(panel + part * Base::lanes() * width, sums.data(), width, K);
    }
  }
  void shrink(acc_t* t, const acc_t* a, const acc_t* shrink, int64_t, int64_t rows) const {
    const int64_t R = this->p.R;
    for (int64_t r = 0; r < R; r += kPanel<acc_t>) {
      const int64_t width = width_of<acc_t>(R - r), depth = Base::lanes();
      for (int64_t part = 0; part < parts(); ++part)
        multiply_panel<acc_t, kPairs, false>(
            t + r, this->t_lanes(), part > 0, rows, width == kPanel<acc_t>,
            {a, depth, shrink + r * lanes() + part * depth * width, width, depth});
    }
  }
  int64_t passes() const { return parts() * Base::passes(); }
  Lanes<acc_t> pass(int64_t i, const acc_t* a, int64_t row, int64_t rows) const {
    Lanes<acc_t> lanes = Base::pass(i % Base::passes(), a, row, rows);
    lanes.from += i / Base::passes() * Base::lanes();
    return lanes;
  }
  bool by_panel() const { return Base::passes() == 1; }

  void visit(int64_t slot, int64_t row, int64_t count, const acc_t* a, acc_t* t) const {
    const int64_t Rp = padded<acc_t>(this->p.R);
    for (int64_t i = 0; i < count * Rp; ++i) t[i] *= static_cast<acc_t>(scale);
    factors.add(slot, row, count, t, Rp, [&](size_t) { return a; });
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_fwd_cpu(const at::Tensor& x,
                                                       const at::Tensor& weight,
                                                       const std::optional<at::Tensor>& bias,
                                                       const at::Tensor& down, const at::Tensor& up,
                                                       double scale,
                                                       const std::optional<at::Tensor>& gain) {
  const int64_t I = x.size(-1), O = weight.size(0), R = down.size(0),
                M = x.numel() / std::max<int64_t>(I, 1);
  check_shape(weight, "weight", {O, I});
  check_shape(down, "down", {R, I});
  check_shape(up, "up", {O, R});
  check_contiguous(x, "x");
  const at::Tensor w = weight.contiguous(), d = down.contiguous(), u = up.contiguous();
  for (const auto& [t, name] : {std::pair{&w, "weight"}, {&d, "down"}, {&u, "up"}})
    check_like(*t, name, x);
  const at::Tensor b = row_vector(bias, "bias", O, x), g = row_gain(gain, O, x);

  auto sizes = x.sizes().vec();
  sizes.back() = O;
  at::Tensor y = at::empty(sizes, x.options());
  sizes.back() = R;
  at::Tensor h = at::empty(sizes, x.options());
  if (M == 0) return {y, h};
  const bool adds = by_torch(x, M, I, O, false);
  if (adds) torch_product(y, x, w.t(), gain ? at::Tensor() : b);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    const LowRank<scalar_t> p = forward_product<scalar_t>(x, w, b, d, u, y, g);
    with_pairs<scalar_t>(I, [&](auto pairs) {
      Forward<scalar_t, pairs.value> op{{p}, scale, h.mutable_data_ptr<scalar_t>()};
      run_product(op, rows_of(op), adds);
    });
  });
  return {y, h};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd_cpu(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& h, const at::Tensor& weight,
    const at::Tensor& down, const at::Tensor& up, double scale,
    const std::optional<at::Tensor>& gain, std::array<bool, 4> needs) {
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

  const at::Tensor g = row_gain(gain, O, x);
  const auto [need_dx, need_ddown, need_dup, need_dgain] = needs;
  const auto make = [&](bool need, at::IntArrayRef sizes) {
    return need && M > 0 ? at::empty(sizes, x.options())
                         : at::zeros(need ? sizes : at::IntArrayRef{0}, x.options());
  };
  at::Tensor dx = make(need_dx, x.sizes()), ddown = make(need_ddown, d.sizes()),
             dup = make(need_dup, u.sizes()),
             dgain = at::zeros({need_dgain ? O : 0}, gain ? gain->options() : x.options());
  if (M == 0) return {dx, ddown, dup, dgain};
  const bool adds = need_dx && by_torch(dy, M, O, I, true);
  if (adds) gain ? torch_product_of_gained(dx, dy, w, g) : torch_product(dx, dy, w);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    if (needs[3]) {
      const auto p = forward_product<scalar_t>(x, w, {}, d, u, {}, {});
      with_pairs<scalar_t>(I, [&](auto pairs) {
        gain_gradient(Again<scalar_t, pairs.value>{{{p}, scale, nullptr}, data<scalar_t>(h)},
                      data<scalar_t>(dy),
                      dgain.mutable_data_ptr<at::opmath_type<scalar_t>>());
      });
    }
    if (!needs[0] && !needs[1] && !needs[2]) return;
    // neither dx nor ddown: no need of dh
    const bool need_dh = needs[0] || needs[1];
    const LowRank<scalar_t> p{M, O, needs[0] ? I : 0, need_dh ? R : 0,
                              data<scalar_t>(dy), data<scalar_t>(w), data<scalar_t>(u),
                              data<scalar_t>(d), nullptr, false,
                              needs[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr, x.options(),
                              data_or_null<at::opmath_type<scalar_t>>(g)};
    // two products in pairs are for tiles alone; elsewhere a gain scales W and up in float32
    with_pairs<scalar_t>(gain && !has_tiles() ? 1 : O, [&](auto pairs) {
      constexpr bool kPairs = pairs.value;
      const Rows rows(M, kPairs ? O / 2 : O, sizeof(at::opmath_type<scalar_t>), M * O * I,
                      kHeight<kPairs>);
      Backward<scalar_t, kPairs> op{
          {p},
          scale,
          {{{O, R, 0, scale, data<scalar_t>(dy),
             needs[1] ? ddown.mutable_data_ptr<scalar_t>() : nullptr,
             needs[2] ? dup.mutable_data_ptr<scalar_t>() : nullptr, p.gain}},
           data<scalar_t>(x), data<scalar_t>(h), I, R, rows, x.options()}};
      run_product(op, rows, adds);
      op.factors.write();
    });
  });
  return {dx, ddown, dup, dgain};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("lora_linear_fwd_cpu", &lorakern::lora_linear_fwd_cpu);
  m.def("lora_linear_bwd_cpu", &lorakern::lora_linear_bwd_cpu);
}
