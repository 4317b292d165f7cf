// hada_delta on CPU. Spec: lorakern/ops/hada_delta/reference.py
//
// delta[O, I] = scale · (up1 down1) ∘ (up2 down2), [O, R] [R, I] and [O, S] [S, I]. The plain-torch
// spec writes and reads both products and, backward, five matrices of their size. Here a panel of
// both is made in cache, and delta is written once or its gradient read once.

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "hada_tile.h"
#include "outer_tiles.h"

namespace lorakern {
namespace {

void check(const at::Tensor& down1, const at::Tensor& up1, const at::Tensor& down2,
           const at::Tensor& up2) {
  const int64_t O = up1.size(0), I = down1.size(1);
  check_shape(up1, "up1", {O, down1.size(0)});
  check_shape(down2, "down2", {down2.size(0), I});
  check_shape(up2, "up2", {O, down2.size(0)});
  for (const auto& [t, name] : {std::pair{&up1, "up1"}, {&down2, "down2"}, {&up2, "up2"}})
    check_like(*t, name, down1);
}

}  // namespace

at::Tensor hada_delta_fwd_cpu(const at::Tensor& down1, const at::Tensor& up1,
                              const at::Tensor& down2, const at::Tensor& up2, double scale) {
  check(down1, up1, down2, up2);
  const int64_t O = up1.size(0), I = down1.size(1);
  at::Tensor delta = at::empty({O, I}, up1.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, delta.scalar_type(), "hada_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    using Vec = at::vec::Vectorized<acc_t>;
    constexpr int64_t kWide = kPanel<acc_t>;
    const auto h = hadamard<scalar_t>(down1, up1, down2, up2, scale);
    scalar_t* const out = delta.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, (I + kWide - 1) / kWide, 1, [&](int64_t b, int64_t e) {
      for (int64_t panel = b; panel < e; ++panel) {
        const int64_t first = panel * kWide, used = std::min(kWide, I - first);
        const int64_t width = used > kWidth<acc_t> ? kWide : kWidth<acc_t>;
        hada_panel(h, false, O, first, used, width,
                   [&](int64_t row, int64_t lane, Vec one, Vec two) {
                     acc_t line[kWidth<acc_t>];
                     (Vec(h.scale) * one * two).store(line);
                     narrow<scalar_t, acc_t>(out + row * I + first + lane, line, nullptr,
                                             std::clamp<int64_t>(used - lane, 0, kWidth<acc_t>));
                   });
      }
    });
  });
  return delta;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> hada_delta_bwd_cpu(
    const at::Tensor& ddelta, const at::Tensor& down1, const at::Tensor& up1,
    const at::Tensor& down2, const at::Tensor& up2, double scale, std::array<bool, 4> needs) {
  check(down1, up1, down2, up2);
  const int64_t O = up1.size(0), I = down1.size(1);
  check_shape(ddelta, "ddelta", {O, I});
  check_contiguous(ddelta, "ddelta");
  check_like(ddelta, "ddelta", down1);
  std::array<at::Tensor, 4> grads;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, up1.scalar_type(), "hada_delta", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto h = hadamard<scalar_t>(down1, up1, down2, up2, scale);
    const Tiles tiles(O, I);
    const HadaGradients<acc_t> sums(h, tiles.o_count, tiles.i_count, nullptr);
    const scalar_t* const from = ddelta.const_data_ptr<scalar_t>();
    at::parallel_for(0, tiles.o_count * tiles.i_count, 1, [&](int64_t b, int64_t e) {
      std::vector<acc_t> g;
      for (int64_t tile = b; tile < e; ++tile) {
        const int64_t o_tile = tile / tiles.i_count, i_tile = tile % tiles.i_count;
        const int64_t o = tiles.row(o_tile), i = tiles.column(i_tile);
        const int64_t rows = tiles.row(o_tile + 1) - o, cols = tiles.column(i_tile + 1) - i;
        g.resize(rows * cols);
        for (int64_t r = 0; r < rows; ++r)
          widen(g.data() + r * cols, from + (o + r) * I + i, cols);
        sums.add(o_tile, i_tile, o, rows, i, cols, g.data(), cols);
      }
    });
    grads = sums.template total<scalar_t>(needs.data(), up1.options());
  });
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("hada_delta_fwd_cpu", &lorakern::hada_delta_fwd_cpu);
  m.def("hada_delta_bwd_cpu", &lorakern::hada_delta_bwd_cpu);
}
