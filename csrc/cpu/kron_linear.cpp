// kron_linear on CPU. Spec: lorakern/ops/kron_linear/reference.py
//
// The plain-torch spec turns and writes tensors of x's and y's size for each product with C and D.
// Here a row of x is a [B, Q] matrix and one of y is [A, P]: for a block of rows in cache
// C (X Dᵀ), scaled, is what the sums of the base product start from, so that y is written once.
// Backward makes X Dᵀ again beside Cᵀ dY, and takes dC, dD and dx from them in the same pass over
// x and dy. Nothing is saved but x and the factors.

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "gain.h"
#include "kron.h"
#include "linear.h"

namespace lorakern {
namespace {

template <typename scalar_t, bool kPairs>
struct Forward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  const Kron<acc_t>& f;
  // s · Dᵀ
  Panels<acc_t>& turned;
  acc_t* room;
  int64_t room_size;

  static int64_t size(const Kron<acc_t>& f, int64_t block) {
    return block * f.B * (f.Q + padded<acc_t>(f.P)) + f.A * padded<acc_t>(f.P) + kSlack<acc_t>;
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q, Pp = padded<acc_t>(f.P);
    acc_t* const x = room + slot * room_size;
    acc_t* const h = x + rows * I;
    acc_t* const y = h + rows * f.B * Pp + kSlack<acc_t>;
    widen(x, this->p.a + row * I, rows * I);
    turned.multiply(h, x, f.Q, rows * f.B);
    for (int64_t m = 0; m < rows; ++m) {
      multiply_small<false>(y, f.C(), f.B, f.A, h + m * f.B * Pp, Pp, f.B, f.P);
      copy_rows(sums + m * ld, y, f.A, f.P);
    }
  }
};

template <typename scalar_t, bool kPairs>
struct Backward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  const Kron<acc_t>& f;
  const scalar_t* x;
  // C times s
  const acc_t* scaled;
  Panels<acc_t>&turned, &straight;
  bool need_dx, need_dc, need_dd;
  Rows rows_of;
  acc_t *room, *dc, *dd;
  int64_t room_size;

  static int64_t size(const Kron<acc_t>& f, int64_t block) {
    const int64_t Pp = padded<acc_t>(f.P), Qp = padded<acc_t>(f.Q);
    return block * (f.A * f.P + f.B * (f.Q + 2 * Pp)) + (f.A + f.P) * padded<acc_t>(f.B) +
           f.B * Qp + 2 * kSlack<acc_t>;
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q, O = f.A * f.P, Pp = padded<acc_t>(f.P), Bp = padded<acc_t>(f.B);
    const bool add = row > slot * rows_of.per_slot;
    acc_t* const dy = room + slot * room_size;
    acc_t* const xs = dy + rows * O + kSlack<acc_t>;
    acc_t* const h = xs + rows * I + kSlack<acc_t>;
    acc_t* const t = h + rows * f.B * Pp;
    acc_t* const run = t + rows * f.B * Pp;
    acc_t* const small = run + f.A * Bp;
    acc_t* const slot_dc = dc + slot * f.A * Bp;
    acc_t* const slot_dd = dd + slot * f.P * padded<acc_t>(f.Q);
    widen(dy, this->p.a + row * O, rows * O);
    if (this->p.gain) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t o = 0; o < O; ++o) dy[m * O + o] *= static_cast<acc_t>(this->p.gain[o]);
    }
    if (need_dc || need_dd) widen(xs, x + row * I, rows * I);
    if (need_dc) turned.multiply(h, xs, f.Q, rows * f.B);
    for (int64_t m = 0; m < rows; ++m) {
      if (need_dc) {
        // dC += dY Hᵀ, in short runs, which keep a long sum exact
        const bool goes_on = m % kNarrowRun != 0;
        for (int64_t b = 0; b < f.B; b += kPanel<acc_t>) {
          const int64_t used = std::min<int64_t>(kPanel<acc_t>, f.B - b);
          const int64_t width = used > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>;
          pack_transposed(small, width, h + (m * f.B + b) * Pp, Pp, used, f.P);
          multiply_panel<acc_t, false, false>(run + b, Bp, goes_on, f.A, width == kPanel<acc_t>,
                                              {dy + m * O, f.P, small, width, f.P});
        }
        if (m + 1 == rows || (m + 1) % kNarrowRun == 0) {
          for (int64_t i = 0; i < f.A * Bp; ++i) slot_dc[i] += run[i];
        }
      }
      // T = s · Cᵀ dY
      if (need_dx || need_dd)
        multiply_small<true>(t + m * f.B * Pp, scaled, f.B, f.B, dy + m * O, f.P, f.A, f.P);
    }
    // dD += Tᵀ X
    if (need_dd) multiply_small<true>(slot_dd, t, Pp, f.P, xs, f.Q, rows * f.B, f.Q, add);
    for (int64_t m = 0; need_dx && m < rows; ++m) {
      straight.multiply(small, t + m * f.B * Pp, Pp, f.B);
      copy_rows(sums + m * ld, small, f.B, f.Q);
    }
  }
};

void check(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& c_up,
           const std::optional<at::Tensor>& c_down, const at::Tensor& d_up,
           const std::optional<at::Tensor>& d_down) {
  const int64_t B = (c_down ? *c_down : c_up).size(1), Q = (d_down ? *d_down : d_up).size(1);
  check_contiguous(x, "x");
  check_shape(weight, "weight", {c_up.size(0) * d_up.size(0), B * Q});
  check_like(weight, "weight", x);
  check_like(c_up, "c_up", x);
  check_like(d_up, "d_up", x);
  if (c_down) check_like(*c_down, "c_down", x);
  if (d_down) check_like(*d_down, "d_down", x);
}

// runs run(op) with the forward op of these operands
template <typename scalar_t, typename Run>
void with_forward(const LowRank<scalar_t>& p, const Kron<at::opmath_type<scalar_t>>& f,
                  double scale, const Run& run) {
  using acc_t = at::opmath_type<scalar_t>;
  const at::Tensor d = f.d * scale;
  Panels<acc_t> turned(d.const_data_ptr<acc_t>(), true, f.Q, f.P);
  with_pairs<scalar_t>(p.K, [&](auto pairs) {
    using Op = Forward<scalar_t, pairs.value>;
    Op op{{p}, f, turned, nullptr, 0};
    const Rows rows = rows_of(op);
    op.room_size = Op::size(f, rows.block) + kSlack<acc_t>;
    at::Tensor room = scratch<acc_t>(rows.slots * op.room_size, p.options);
    op.room = room.mutable_data_ptr<acc_t>();
    run(op);
  });
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
                   g = row_vector(gain, "gain", O, x);
  auto sizes = x.sizes().vec();
  sizes.back() = O;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "kron_linear", [&] {
    const auto f = whole<scalar_t>(c_up, c_down, d_up, d_down);
    with_forward(forward_product<scalar_t>(x, w, b, {}, {}, y, g), f, scale,
                 [&](auto& op) { block_product(op, rows_of(op)); });
  });
  return y;
}

using SixTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

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
  const at::Tensor w = weight.contiguous(), g = row_vector(gain, "gain", O, x);
  at::Tensor dx = at::empty(needs[0] ? x.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor dgain = at::zeros({needs[5] ? O : 0}, x.options());
  const bool need_dc = needs[1] || needs[2], need_dd = needs[3] || needs[4];
  at::Tensor dc, dd;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "kron_linear", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto f = whole<scalar_t>(c_up, c_down, d_up, d_down);
    if (needs[5] && M > 0) {
      with_forward(forward_product<scalar_t>(x, w, {}, {}, {}, {}, {}), f, scale, [&](auto& op) {
        gain_gradient(op, data<scalar_t>(dy), dgain.mutable_data_ptr<scalar_t>());
      });
    }
    const int64_t Bp = padded<acc_t>(f.B), Qp = padded<acc_t>(f.Q);
    const at::Tensor c = f.c * scale;
    Panels<acc_t> turned(f.D(), true, f.Q, f.P), straight(f.D(), false, f.P, f.Q);
    const LowRank<scalar_t> p{M, O, needs[0] ? I : 0, 0, data<scalar_t>(dy), data<scalar_t>(w),
                              nullptr, nullptr, nullptr, false,
                              needs[0] ? dx.mutable_data_ptr<scalar_t>() : nullptr, x.options(),
                              data_or_null<scalar_t>(g)};
    at::Tensor parts_c = scratch<acc_t>(f.A * Bp, x.options()).zero_(),
               parts_d = scratch<acc_t>(f.P * Qp, x.options()).zero_();
    if (M > 0 && (needs[0] || need_dc || need_dd)) {
      with_pairs<scalar_t>(gain ? 1 : O, [&](auto pairs) {
        using Op = Backward<scalar_t, pairs.value>;
        const Rows rows(M, pairs.value ? O / 2 : O, sizeof(acc_t), M * O * I);
        const int64_t size = Op::size(f, rows.block) + kSlack<acc_t>;
        at::Tensor room = scratch<acc_t>(rows.slots * size, x.options());
        parts_c = scratch<acc_t>(rows.slots * f.A * Bp, x.options()).zero_();
        parts_d = scratch<acc_t>(rows.slots * f.P * Qp, x.options());
        Op op{{p}, f, data<scalar_t>(x), c.const_data_ptr<acc_t>(), turned, straight,
              needs[0], need_dc, need_dd, rows, room.mutable_data_ptr<acc_t>(),
              parts_c.mutable_data_ptr<acc_t>(), parts_d.mutable_data_ptr<acc_t>(), size};
        block_product(op, rows);
      });
    }
    const auto total = [](const at::Tensor& parts, int64_t rows, int64_t cols) {
      const at::Tensor all = parts.view({-1, rows, padded<acc_t>(cols)});
      at::Tensor sum = all[0].clone();
      for (int64_t i = 1; i < all.size(0); ++i) sum.add_(all[i]);
      return sum.narrow(1, 0, cols);
    };
    dc = total(parts_c, f.A, f.B) * scale;
    dd = total(parts_d, f.P, f.Q);
  });
  const auto back = [&](const at::Tensor& dwhole, const at::Tensor& up,
                        const std::optional<at::Tensor>& down, const bool* need) {
    const auto type = dwhole.scalar_type();
    const at::Tensor none = at::empty({0}, x.options());
    const at::Tensor dup = need[0] ? (down ? at::matmul(dwhole, down->to(type).t()) : dwhole) : none;
    const at::Tensor ddown = need[1] && down ? at::matmul(up.to(type).t(), dwhole) : none;
    return std::pair(dup.to(x.scalar_type()).contiguous(), ddown.to(x.scalar_type()));
  };
  const auto [dc_up, dc_down] = back(dc, c_up, c_down, &needs[1]);
  const auto [dd_up, dd_down] = back(dd, d_up, d_down, &needs[3]);
  return {dx, dc_up, dc_down, dd_up, dd_down, dgain};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("kron_linear_fwd_cpu", &lorakern::kron_linear_fwd_cpu);
  m.def("kron_linear_bwd_cpu", &lorakern::kron_linear_bwd_cpu);
}
