// kron_linear on CPU. Spec: lorakern/ops/kron_linear/reference.py
//
// The plain-torch spec turns and writes tensors of x's and y's size for each product with C and D;
// here both meet a block of rows in cache (kron_block.h), and bfloat16 does in tiles where a machine
// has them (kron_tiles_block.h). Saved: x and the factors.

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "four_factors.h"
#include "gain.h"
#include "kron_block.h"
#include "kron_tiles_block.h"
#include "linear.h"

namespace lorakern {
namespace {

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& c_up,
           const std::optional<at::Tensor>& c_down, const at::Tensor& d_up,
           const std::optional<at::Tensor>& d_down) {
  const int64_t B = (c_down ? *c_down : c_up).size(1), Q = (d_down ? *d_down : d_up).size(1);
  check_contiguous(x, "x");
  check_shape(weight, "weight", {c_up.size(0) * d_up.size(0), B * Q});
  check_like(weight, "weight", x);
  check_like(c_up, "c_up", x);
  check_like(d_up, "d_up", x);
  if (c_down) {
    check_shape(*c_down, "c_down", {c_up.size(1), B});
    check_like(*c_down, "c_down", x);
  }
  if (d_down) {
    check_shape(*d_down, "d_down", {d_up.size(1), Q});
    check_like(*d_down, "d_down", x);
  }
}

// Whether the base product is torch's: where that suits LoRA too, and on Intel's cores wherever a
// product takes longer than a call of it.
bool adds_to_torch(const at::Tensor& a, int64_t M, int64_t K, int64_t N, bool backward) {
  if (a.scalar_type() == at::kFloat && fast_torch() && M * K * N >= 1 << 24) return true;
  return by_torch(a, M, K, N, backward);
}

#if defined(LORAKERN_AMX)
// whether factors are multiplied in tiles, with D made whole: not two that are narrow enough to be
// faster in float32
bool fits_tiles(const Kron<float>& f) {
  return f.A % 2 == 0 && f.B % 2 == 0 && f.P % 2 == 0 && f.Q % 2 == 0 &&
         (f.R == 0 || f.P * f.Q < 16 * f.R * (f.P + f.Q)) && amx::ready();
}

// C and D whole in bfloat16
std::pair<at::Tensor, at::Tensor> rounded(const Kron<float>& f) {
  const at::Tensor d = f.R ? at::matmul(f.d_up, f.d_down) : f.d;
  return {f.c.to(at::kBFloat16), d.to(at::kBFloat16)};
}
#endif

// C times s
template <typename acc_t>
std::vector<acc_t> scaled(const Kron<acc_t>& f, double scale) {
  std::vector<acc_t> c(f.C(), f.C() + f.A * f.B);
  for (acc_t& value : c) value *= static_cast<acc_t>(scale);
  return c;
}

// runs run(op) with the forward op of these operands
template <typename scalar_t, typename Run>
void with_forward(const LowRank<scalar_t>& p, const Kron<at::opmath_type<scalar_t>>& f,
                  double scale, bool adds, const Run& run) {
  using acc_t = at::opmath_type<scalar_t>;
#if defined(LORAKERN_AMX)
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (fits_tiles(f)) {
      const auto [C, D] = rounded(f);
      const KronTiles tiles(C, D);
      KronTilesForward op(p, tiles, static_cast<float>(scale));
      op.make_room(rows_of(op).slots);
      return run(op);
    }
  }
#endif
  const auto c = scaled(f, scale);
  Inner<acc_t> turned(f, true);
  with_pairs<scalar_t>(p.K, [&](auto pairs) {
    using Op = KronForward<scalar_t, pairs.value>;
    Op op{{p}, f, c.data(), turned, adds};
    const Rows rows = rows_of(op);
    op.most = kron_run(f, rows);
    op.room_size = Op::size(f, op.most) + kSlack<acc_t>;
    at::Tensor room = scratch<acc_t>(rows.slots * op.room_size, p.options);
    op.room = room.mutable_data_ptr<acc_t>();
    run(op);
  });
}

// (dC, {dD}) beside dx in p, where bfloat16 is multiplied in tiles
template <typename scalar_t>
std::optional<std::pair<at::Tensor, std::vector<at::Tensor>>> backward_in_tiles(
    const LowRank<scalar_t>& p, const Kron<at::opmath_type<scalar_t>>& f, const scalar_t* x,
    double scale, bool need_dc, bool need_dd) {
#if defined(LORAKERN_AMX)
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (p.gain || p.M == 0 || !fits_tiles(f)) return {};
    const auto [C, D] = rounded(f);
    const KronTiles turned(C.t().contiguous(), D.t().contiguous());
    KronTilesBackward op(p, turned, x, static_cast<float>(scale), p.N > 0, need_dc, need_dd);
    const Rows rows(p.M, op.lanes(), sizeof(float), p.M * p.K * f.B * f.Q, kHeight<true>);
    op.make_room(rows.slots);
    block_product(op, rows);
    return {{turned_sum(op.dc, op.b, op.a) * scale, {turned_sum(op.dd, op.q, op.across_p) * scale}}};
  }
#endif
  return {};
}

}  // namespace

at::Tensor kron_linear_fwd_cpu(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& c_up,
                               const std::optional<at::Tensor>& c_down, const at::Tensor& d_up,
                               const std::optional<at::Tensor>& d_down, double scale,
                               const std::optional<at::Tensor>& gain) {
  check(x, weight, c_up, c_down, d_up, d_down);
  const int64_t O = weight.size(0), I = weight.size(1);
  TORCH_CHECK_VALUE(x.size(-1) == I, "x: want [..., ", I, "], got ", x.sizes());
  const at::Tensor w = weight.contiguous(), b = row_vector(bias, "bias", O, x),
                   g = row_gain(gain, O, x);
  auto sizes = x.sizes().vec();
  sizes.back() = O;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const int64_t M = rows_in(x);
  const bool adds = !gain && adds_to_torch(x, M, I, O, false);
  if (adds) torch_product(y, x, w.t(), b);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "kron_linear", [&] {
    const auto f = kron<scalar_t>(c_up, c_down, d_up, d_down);
    with_forward(forward_product<scalar_t>(x, w, b, {}, {}, y, g), f, scale, adds,
                 [&](auto& op) { run_kron(op, rows_of(op)); });
  });
  return y;
}

SixTensors kron_linear_bwd_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& c_up, const std::optional<at::Tensor>& c_down,
                               const at::Tensor& d_up, const std::optional<at::Tensor>& d_down,
                               double scale, const std::optional<at::Tensor>& gain,
                               std::array<bool, 6> needs) {
  check(x, weight, c_up, c_down, d_up, d_down);
  const int64_t O = weight.size(0), I = weight.size(1), M = rows_in(x);
  check_contiguous(dy, "dy");
  check_like(dy, "dy", x);
  TORCH_CHECK_VALUE(dy.numel() == M * O, "dy: want ", M, " rows of ", O, ", got ", dy.sizes());
  const at::Tensor w = weight.contiguous(), g = row_gain(gain, O, x);
  at::Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor dgain = at::zeros({needs[5] ? O : 0}, gain ? gain->options() : x.options());
  const bool need_dc = needs[1] || needs[2], need_dd = needs[3] || needs[4];
  const bool adds = needs[0] && M > 0 && !gain && adds_to_torch(dy, M, O, I, true);
  if (adds) torch_product(dx, dy, w);
  at::Tensor dc;
  // dD, or dd_up and dd_down
  std::vector<at::Tensor> dd(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "kron_linear", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto f = kron<scalar_t>(c_up, c_down, d_up, d_down);
    if (needs[5] && M > 0) {
      with_forward(forward_product<scalar_t>(x, w, {}, {}, {}, {}, {}), f, scale, false,
                   [&](auto& op) {
                     gain_gradient(op, data<scalar_t>(dy), dgain.mutable_data_ptr<acc_t>());
                   });
    }
    const LowRank<scalar_t> p{M, O, needs[0] ? I : 0, 0, data<scalar_t>(dy), data<scalar_t>(w),
                              nullptr, nullptr, nullptr, false,
                              needs[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr, x.options(),
                              data_or_null<at::opmath_type<scalar_t>>(g)};
    if (const auto grads = backward_in_tiles(p, f, data<scalar_t>(x), scale, need_dc, need_dd)) {
      std::tie(dc, dd) = *grads;
      return;
    }
    using Sums = KronBackward<scalar_t, false>;
    const int64_t dc_size = Sums::dc_size(f), dd_size = Sums::dd_size(f);
    const auto c = scaled(f, scale);
    Inner<acc_t> straight(f, false);
    std::optional<Panels<acc_t>> turned_down;
    if (f.R) turned_down.emplace(f.d_down.const_data_ptr<acc_t>(), true, f.Q, f.R);
    int64_t slots = 0;
    at::Tensor parts_c = scratch<acc_t>(0, x.options()), parts_d = parts_c;
    if (M > 0 && (needs[0] || need_dc || need_dd)) {
      with_pairs<scalar_t>(gain ? 1 : O, [&](auto pairs) {
        using Op = KronBackward<scalar_t, pairs.value>;
        const Rows rows(M, pairs.value ? O / 2 : O, sizeof(acc_t), M * O * I);
        const int64_t most = kron_run(f, rows), size = Op::size(f, most) + kSlack<acc_t>;
        at::Tensor room = scratch<acc_t>(rows.slots * size, x.options());
        slots = rows.slots;
        parts_c = scratch<acc_t>(slots * dc_size, x.options()).zero_();
        parts_d = scratch<acc_t>(slots * dd_size, x.options()).zero_();
        Op op{{p}, f, data<scalar_t>(x), c.data(), straight,
              turned_down ? &*turned_down : nullptr,
              needs[0], need_dc, need_dd, adds, room.mutable_data_ptr<acc_t>(),
              parts_c.mutable_data_ptr<acc_t>(), parts_d.mutable_data_ptr<acc_t>(), size, most};
        run_kron(op, rows);
      });
    }
    const auto part_of_dd = [&](int64_t from, int64_t rows, int64_t cols) {
      return sum_of_parts<acc_t>(parts_d.const_data_ptr<acc_t>() + from, slots, dd_size, rows,
                                 padded<acc_t>(cols), cols, acc_t(1), x.options());
    };
    if (need_dc)
      dc = Sums::dc_of(f, parts_c.const_data_ptr<acc_t>(), slots, scale, x.options());
    if (!need_dd) return;
    if (f.R) {
      dd = {part_of_dd(0, f.P, f.R), part_of_dd(f.P * padded<acc_t>(f.R), f.R, f.Q)};
    } else {
      dd = {part_of_dd(0, f.P, f.Q)};
    }
  });
  // one each: results must not share memory
  const auto none = [&] { return at::empty({0}, x.options()); };
  const auto rounded = [&](bool need, const at::Tensor& t) {
    return need ? t.to(x.scalar_type()).contiguous() : none();
  };
  const auto back = [&](const at::Tensor& dwhole, const at::Tensor& up,
                        const std::optional<at::Tensor>& down, const bool* need) {
    if (!need[0] && !need[1]) return std::pair(none(), none());
    const auto type = dwhole.scalar_type();
    const at::Tensor dup = need[0] && down ? at::matmul(dwhole, down->to(type).t()) : dwhole;
    const at::Tensor ddown = need[1] && down ? at::matmul(up.to(type).t(), dwhole) : none();
    return std::pair(rounded(need[0], dup), rounded(need[1], ddown));
  };
  const auto [dc_up, dc_down] = back(dc, c_up, c_down, &needs[1]);
  const auto [dd_up, dd_down] =
      dd.size() == 2 ? std::pair(rounded(needs[3], dd[0]), rounded(needs[4], dd[1]))
                     : back(dd[0], d_up, d_down, &needs[3]);
  return {dx, dc_up, dc_down, dd_up, dd_down, dgain};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_linear_fwd_cpu", &lorakern::kron_linear_fwd_cpu);
  m.def("kron_linear_bwd_cpu", &lorakern::kron_linear_bwd_cpu);
}
