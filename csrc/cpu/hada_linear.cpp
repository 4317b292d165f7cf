// hada_linear on CPU. Spec: lorakern/ops/hada_linear/reference.py
//
// The plain-torch spec makes ΔW and two products with it, and dyᵀ x of the weight's size. Here:
// - Small ranks go by Khatri-Rao: ΔW is the low-rank product up* down* of rank R·S, with
//   up*[o, (r, s)] = up1[o, r] up2[o, s], and the kernels of lora_linear do the rest.
// - Larger ones: ΔW is added to the panels of W, in the type of the sums, as they are packed, so
//   that the product with W + ΔW is one. Tiles of dyᵀ x are consumed in cache (outer_tiles.h).
//   AMX tiles make ΔW, and the gradients of its factors, of bfloat16 (hada_pairs.h). Where torch's
//   product is the faster one, it multiplies blocks of W + ΔW (hada_blocks.h).
// Nothing is saved but x and the factors.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "four_factors.h"
#include "gain.h"
#include "hada_blocks.h"
#include "hada_pair_gradients.h"
#include "hada_pairs.h"
#include "hada_tile.h"
#include "khatri_rao.h"
#include "lora_linear.h"
#include "outer_tiles.h"

namespace lorakern {
namespace {

template <typename scalar_t_>
struct Product : Block<scalar_t_, false> {
  using acc_t = at::opmath_type<scalar_t_>;
  const Hadamard<acc_t>& h;

  void pack(acc_t* panel, int64_t first, int64_t width) const {
    using Vec = at::vec::Vectorized<acc_t>;
    const auto& p = this->p;
    pack_panel<false>(panel, p.wide, p.transposed, p.K, p.N, first, width);
    const int64_t used = std::min(width, p.N - first);
    hada_panel(h, p.transposed, p.K, first, used, width,
               [&](int64_t row, int64_t lane, Vec one, Vec two) {
                 acc_t* const out = panel + row * width + lane;
                 (Vec::loadu(out) + Vec(h.scale) * one * two).store(out);
               });
    this->scale_rows(panel, width);
  }
};

// The update as products take it: in pairs where tiles multiply them.
struct Update {
  const at::Tensor &down1, &up1, &down2, &up2;
  double scale;
#if defined(LORAKERN_AMX)
  std::optional<HadaPairs> pairs;
#endif
  Update(const at::Tensor& down1, const at::Tensor& up1, const at::Tensor& down2,
         const at::Tensor& up2, double scale)
      : down1(down1), up1(up1), down2(down2), up2(up2), scale(scale) {
#if defined(LORAKERN_AMX)
    if (up1.scalar_type() == at::kBFloat16 && amx::ready())
      pairs.emplace(down1, up1, down2, up2, scale);
#endif
  }
  template <typename scalar_t>
  Hadamard<at::opmath_type<scalar_t>> wide() const {
    return hadamard<scalar_t>(down1, up1, down2, up2, scale);
  }
};

// The product with W + ΔW, by the way that suits it: run(op).
template <typename scalar_t, typename Run>
void with_product(const LowRank<scalar_t>& p, const Update& update, const Run& run) {
#if defined(LORAKERN_AMX)
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (p.K % 2 == 0 && update.pairs) return run(PairProduct{{p}, *update.pairs});
  }
#endif
  const auto h = update.wide<scalar_t>();
  run(Product<scalar_t>{{p}, h});
}

// The gradients of the factors, from dyᵀ x in tiles.
template <typename scalar_t>
std::array<at::Tensor, 4> factor_gradients(const Update& update, const at::Tensor& dy,
                                           const at::Tensor& x, const at::Tensor& gain, int64_t O,
                                           int64_t I, const bool* needs) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t M = rows_in(x);
  const auto* const gains = data_or_null<acc_t>(gain);
#if defined(LORAKERN_AMX)
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (update.pairs) {
      const Tiles tiles = amx_tiles(O, I);
      const HadaPairGradients sums(*update.pairs, tiles, gains);
      outer_amx_tiles(tiles, data<scalar_t>(dy), data<scalar_t>(x), M,
                      [&](auto... tile) { sums.add(tile...); });
      return sums.total(needs);
    }
  }
#endif
  const auto h = update.wide<scalar_t>();
  const bool of_torch = by_torch(x, M, O, I, true);
  const Tiles tiles = of_torch ? torch_tiles(O, I) : Tiles(O, I);
  const HadaGradients<acc_t> sums(h, tiles.o_count, tiles.i_count, gains);
  const auto add = [&](auto... tile) { sums.add(tile...); };
  if (of_torch) {
    outer_tiles_by_torch<acc_t>(tiles, dy, x, add);
  } else {
    outer_tiles<scalar_t, kPairsOf<scalar_t>>(tiles, data<scalar_t>(dy), data<scalar_t>(x), M, add);
  }
  return sums.template total<scalar_t>(needs, x.options());
}

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& down1,
           const at::Tensor& up1, const at::Tensor& down2, const at::Tensor& up2) {
  const int64_t O = weight.size(0), I = weight.size(1), R = down1.size(0), S = down2.size(0);
  check_contiguous(x, "x");
  check_shape(down1, "down1", {R, I});
  check_shape(up1, "up1", {O, R});
  check_shape(down2, "down2", {S, I});
  check_shape(up2, "up2", {O, S});
  for (const auto& [t, name] : {std::pair{&weight, "weight"},
                                {&down1, "down1"},
                                {&up1, "up1"},
                                {&down2, "down2"},
                                {&up2, "up2"}})
    check_like(*t, name, x);
}

}  // namespace

at::Tensor hada_linear_fwd_cpu(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& down1,
                               const at::Tensor& up1, const at::Tensor& down2,
                               const at::Tensor& up2, double scale,
                               const std::optional<at::Tensor>& gain) {
  check(x, weight, down1, up1, down2, up2);
  const int64_t O = weight.size(0), I = weight.size(1);
  TORCH_CHECK_VALUE(x.size(-1) == I, "x: want [..., ", I, "], got ", x.sizes());
  if (prefers_khatri_rao(down1.size(0), down2.size(0), O, I)) {
    const KhatriRao f(down1, up1, down2, up2);
    return std::get<0>(lora_linear_fwd_cpu(x, weight, bias, f.down, f.up, scale, gain));
  }
  const at::Tensor w = weight.contiguous(), b = row_vector(bias, "bias", O, x),
                   g = row_gain(gain, O, x);
  auto sizes = x.sizes().vec();
  sizes.back() = O;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const Update update(down1, up1, down2, up2, scale);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "hada_linear", [&] {
    if (!gain && by_torch(x, rows_in(x), I, O, false))
      return hada_forward_by_torch(update.wide<scalar_t>(), x, w, b, y);
    with_product(forward_product<scalar_t>(x, w, b, {}, {}, y, g), update,
                 [](auto op) { block_product(op, rows_of(op)); });
  });
  return y;
}

SixTensors hada_linear_bwd_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& down1, const at::Tensor& up1,
                               const at::Tensor& down2, const at::Tensor& up2, double scale,
                               const std::optional<at::Tensor>& gain, std::array<bool, 6> needs) {
  check(x, weight, down1, up1, down2, up2);
  const int64_t O = weight.size(0), I = weight.size(1), M = rows_in(x);
  const int64_t R = down1.size(0), S = down2.size(0);
  check_contiguous(dy, "dy");
  check_like(dy, "dy", x);
  TORCH_CHECK_VALUE(dy.numel() == M * O, "dy: want ", M, " rows of ", O, ", got ", dy.sizes());
  const at::Tensor w = weight.contiguous(), g = row_gain(gain, O, x);
  if (prefers_khatri_rao(R, S, O, I)) {
    const KhatriRao f(down1, up1, down2, up2);
    // h [M, R·S] is not kept: it is made again
    const auto h = std::get<1>(lora_linear_fwd_cpu(x, w.narrow(0, 0, 0), {}, f.down,
                                                   f.up.narrow(0, 0, 0), 1, {}));
    const auto [dx, ddown, dup, dgain] = lora_linear_bwd_cpu(
        dy, x, h, w, f.down, f.up, scale, gain,
        {needs[0], needs[1] || needs[3], needs[2] || needs[4], needs[5]});
    const auto grads = f.back(ddown, dup, &needs[1]);
    return {dx, grads[0], grads[1], grads[2], grads[3], dgain};
  }
  const auto make = [&](bool need, at::IntArrayRef sizes) {
    return need && M > 0 ? at::empty(sizes, x.options())
                         : at::zeros(need ? sizes : at::IntArrayRef{0}, x.options());
  };
  at::Tensor dx = make(needs[0], x.sizes()),
             dgain = at::zeros({needs[5] ? O : 0}, gain ? gain->options() : x.options());
  const at::Tensor* const factors[4] = {&down1, &up1, &down2, &up2};
  std::array<at::Tensor, 4> grads;
  for (int k = 0; k < 4; ++k) grads[k] = make(needs[k + 1], factors[k]->sizes());
  if (M == 0) return {dx, grads[0], grads[1], grads[2], grads[3], dgain};
  const Update update(down1, up1, down2, up2, scale);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "hada_linear", [&] {
    if (needs[5]) {
      with_product(forward_product<scalar_t>(x, w, {}, {}, {}, {}, {}), update, [&](const auto& op) {
        gain_gradient(op, data<scalar_t>(dy),
                      dgain.mutable_data_ptr<at::opmath_type<scalar_t>>());
      });
    }
    if (needs[0] && !gain && by_torch(dy, M, O, I, true)) {
      hada_dx_by_torch(update.wide<scalar_t>(), dy, w, dx);
    } else if (needs[0]) {
      const LowRank<scalar_t> p{M, O, I, 0, data<scalar_t>(dy), data<scalar_t>(w), nullptr,
                                nullptr, nullptr, false, dx.mutable_data_ptr<scalar_t>(),
                                x.options(), data_or_null<at::opmath_type<scalar_t>>(g)};
      with_product(p, update, [](auto op) { block_product(op, rows_of(op)); });
    }
    if (needs[1] || needs[2] || needs[3] || needs[4])
      grads = factor_gradients<scalar_t>(update, dy, x, g, O, I, &needs[1]);
  });
  return {dx, grads[0], grads[1], grads[2], grads[3], dgain};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("hada_linear_fwd_cpu", &lorakern::hada_linear_fwd_cpu);
  m.def("hada_linear_bwd_cpu", &lorakern::hada_linear_bwd_cpu);
}
