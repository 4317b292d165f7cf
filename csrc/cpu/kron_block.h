// What kron_linear does with a block of rows in cache. A row of x is a [B, Q] matrix and one of y is
// [A, P]: s·C (X Dᵀ) is what the sums of the base product start from, so that y is written once.
// Backward, Z = dY D gives dx = s·Cᵀ Z and dC, and V = s·C X gives dD, in the same pass over x and
// dy. Or the base product is in the sums already, and all is added to it. A run of rows m stays in
// cache, laid out as [B][m, P], so that a product with C is one over all columns (m, p), and one with
// D is one over all rows m.

#pragma once

#include "block_product.h"
#include "dots.h"
#include "kron.h"
#include "parts.h"

namespace lorakern {

// rows of a run, of a slot's, by the floats of x or y
template <typename acc_t>
int64_t kron_run(const Kron<acc_t>& f, const Rows& rows) {
  constexpr int64_t kRunBytes = 64 << 10;
  const int64_t most = kRunBytes / (sizeof(acc_t) * std::max(f.A * f.P, f.B * f.Q));
  return std::clamp<int64_t>(most, 1, rows.per_slot);
}

template <typename scalar_t, bool kPairs>
struct KronForward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  const Kron<acc_t>& f;
  // C times s
  const acc_t* scaled;
  Inner<acc_t>& turned;
  // whether to what the sums hold
  bool adds;
  acc_t* room = nullptr;
  int64_t room_size = 0, most = 1;

  static int64_t size(const Kron<acc_t>& f, int64_t run) {
    return run * (f.B * f.Q + f.R + kPanel<acc_t>) +
           (f.A + f.B) * padded<acc_t>(run * f.P) + 2 * kSlack<acc_t>;
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q;
    acc_t* const wide = room + slot * room_size;
    acc_t* const t = wide + most * I;
    acc_t* const part = t + most * f.R + kSlack<acc_t>;
    acc_t* const h = part + most * kPanel<acc_t>;
    for (int64_t from = 0; from < rows; from += most) {
      const int64_t run = std::min(most, rows - from), n = run * f.P, ldn = padded<acc_t>(n);
      acc_t* const y = h + f.B * ldn + kSlack<acc_t>;
      const acc_t* const x = rows_of_x(wide, this->p.a + (row + from) * I, run * I);
      for (int64_t b = 0; b < f.B; ++b)
        turned.multiply(h + b * ldn, t, x + b * f.Q, I, run, part);
      multiply_all<false>(y, ldn, scaled, f.B, f.A, h, ldn, f.B, n);
      for (int64_t m = 0; m < run; ++m)
        put_matrix(sums + (from + m) * ld, f.P, adds, y + m * f.P, ldn, f.A, f.P);
    }
  }

  // where they are, or widened
  static const acc_t* rows_of_x(acc_t* wide, const scalar_t* x, int64_t count) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) return x;
    widen(wide, x, count);
    return wide;
  }
};

template <typename scalar_t, bool kPairs>
struct KronBackward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  // terms of dC's sum at a time, and in the sums of some runs: short ones keep a long one exact
  static constexpr int64_t kDeep = 64;
  static int64_t kept_terms(const Kron<acc_t>& f) {
    return kDeep * (has_dots(f) ? kWidth<acc_t> : kDeep);
  }
  // values of a dC that is so small that each is summed in a vector
  static constexpr int64_t kSmall = 512;
  const Kron<acc_t>& f;
  const scalar_t* x;
  // C times s
  const acc_t* scaled;
  Inner<acc_t>& straight;
  // the first step of Dᵀ, where D is of a low rank
  const Panels<acc_t>* turned_down;
  bool need_dx, need_dc, need_dd, adds;
  // dd is dD, or dd_up and dd_down one after the other
  acc_t *room, *dc, *dd;
  int64_t room_size, most;

  static int64_t size(const Kron<acc_t>& f, int64_t run) {
    return dc_size(f) + dd_size(f) + f.A * padded<acc_t>(f.B) + kDeep * kPanel<acc_t> +
           (f.A + 2 * f.B) * padded<acc_t>(run * f.Q) + 5 * kSlack<acc_t> +
           run * (f.A * f.P + (f.A + 1) * f.R + kPanel<acc_t>);
  }
  static bool has_dots(const Kron<acc_t>& f) { return f.A * f.B <= kSmall; }
  static int64_t dc_size(const Kron<acc_t>& f) {
    return f.A * (has_dots(f) ? f.B * kWidth<acc_t> : padded<acc_t>(f.B));
  }
  // times · the sum of `count` parts in that layout, as [A, B]
  static at::Tensor dc_of(const Kron<acc_t>& f, const acc_t* parts, int64_t count, acc_t times,
                          const at::TensorOptions& like) {
    const int64_t size = dc_size(f);
    if (!has_dots(f))
      return sum_of_parts<acc_t>(parts, count, size, f.A, padded<acc_t>(f.B), f.B, times, like);
    const at::Tensor dots = sum_of_parts<acc_t>(parts, count, size, 1, size, size, times, like);
    return dots.view({f.A, f.B, -1}).sum(-1);
  }
  static int64_t dd_size(const Kron<acc_t>& f) {
    return f.R ? f.P * padded<acc_t>(f.R) + f.R * padded<acc_t>(f.Q) : f.P * padded<acc_t>(f.Q);
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    acc_t* const own_dc = room + slot * room_size;
    acc_t* const own_dd = own_dc + dc_size(f);
    int64_t kept = 0;
    for (int64_t from = 0; from < rows; from += most) {
      const int64_t run = std::min(most, rows - from);
      start_run(own_dc, own_dd, kept > 0, row + from, run, sums + from * ld, ld);
      kept += run;
      if (kept * f.Q < kept_terms(f) && from + run < rows) continue;
      if (need_dc) add_to(dc + slot * dc_size(f), own_dc, dc_size(f));
      if (need_dd) add_to(dd + slot * dd_size(f), own_dd, dd_size(f));
      kept = 0;
    }
  }

  // more: whether the own gradients, with room behind them, have sums of other runs
  void start_run(acc_t* own_dc, acc_t* own_dd, bool more, int64_t row, int64_t run, acc_t* sums,
                 int64_t ld) {
    const int64_t I = f.B * f.Q, O = f.A * f.P, n = run * f.Q, ldn = padded<acc_t>(n);
    const int64_t Bp = padded<acc_t>(f.B), Rp = padded<acc_t>(f.R), Qp = padded<acc_t>(f.Q);
    acc_t* const some_dc = own_dd + dd_size(f);
    acc_t* const panel = some_dc + f.A * Bp;
    acc_t* const xs = panel + kDeep * kPanel<acc_t>;
    acc_t* const z = xs + f.B * ldn + kSlack<acc_t>;
    acc_t* const dxs = z + f.A * ldn + kSlack<acc_t>;
    acc_t* const part = dxs + f.B * ldn + kSlack<acc_t>;
    acc_t* const wide = part + run * kPanel<acc_t>;
    // of a low rank: dY up, [A][run, R], and V downᵀ
    acc_t* const u = wide + run * O;
    acc_t* const t = u + f.A * run * f.R + kSlack<acc_t>;
    for (int64_t m = 0; (need_dc || need_dd) && m < run; ++m)
      for (int64_t b = 0; b < f.B; ++b) {
        const scalar_t* const from = x + (row + m) * I + b * f.Q;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          copy_few(xs + b * ldn + m * f.Q, from, f.Q);
        } else {
          widen(xs + b * ldn + m * f.Q, from, f.Q);
        }
      }
    const acc_t* dy = wide;
    if (std::is_same_v<scalar_t, acc_t> && !this->p.gain) {
      dy = reinterpret_cast<const acc_t*>(this->p.a + row * O);
    } else {
      widen(wide, this->p.a + row * O, run * O);
      for (int64_t m = 0; this->p.gain && m < run; ++m)
        for (int64_t o = 0; o < O; ++o) wide[m * O + o] *= this->p.gain[o];
    }
    if (need_dx || need_dc) {
      for (int64_t a = 0; a < f.A; ++a)
        straight.multiply(z + a * ldn, u + a * run * f.R, dy + a * f.P, O, run, part);
    } else if (f.R) {
      for (int64_t a = 0; a < f.A; ++a)
        straight.steps[0].multiply(u + a * run * f.R, dy + a * f.P, O, run, part);
    }
    if (need_dc) sum_dc(own_dc, some_dc, panel, more, z, xs, ldn, n);
    if (need_dx) {
      multiply_all<true>(dxs, ldn, scaled, f.B, f.B, z, ldn, f.A, n);
      for (int64_t m = 0; m < run; ++m)
        put_matrix(sums + m * ld, f.Q, adds, dxs + m * f.Q, ldn, f.B, f.Q);
    }
    if (!need_dd) return;
    acc_t* const v = z;
    multiply_all<false>(v, ldn, scaled, f.B, f.A, xs, ldn, f.B, n);
    for (int64_t a = 0; a < f.A; ++a) {
      const bool adds_up = more || a > 0;
      const acc_t *dy_a = dy + a * f.P, *v_a = v + a * ldn;
      if (f.R) {
        // dd_up += dYᵀ (V downᵀ), dd_down += (dY up)ᵀ V
        turned_down->multiply(t, v_a, f.Q, run, part);
        multiply_all<true>(own_dd, Rp, dy_a, O, f.P, t, f.R, run, f.R, adds_up);
        multiply_all<true>(own_dd + f.P * Rp, Qp, u + a * run * f.R, f.R, f.R, v_a, f.Q, run, f.Q,
                           adds_up);
      } else {
        // dD += dYᵀ V
        multiply_all<true>(own_dd, Qp, dy_a, O, f.P, v_a, f.Q, run, f.Q, adds_up);
      }
    }
  }

  // dC += Z Xᵀ over the columns (m, q)
  void sum_dc(acc_t* own_dc, acc_t* some_dc, acc_t* panel, bool more, const acc_t* z,
              const acc_t* xs, int64_t ldn, int64_t n) const {
    const int64_t Bp = padded<acc_t>(f.B);
    if (has_dots(f)) {
      if (!more) std::fill(own_dc, own_dc + dc_size(f), acc_t(0));
      // kDeep terms a lane at a time
      constexpr int64_t kTerms = kDeep * kWidth<acc_t>;
      for (int64_t k = 0; k < n; k += kTerms)
        add_dots(own_dc, z + k, f.A, xs + k, f.B, ldn, std::min(kTerms, n - k));
      return;
    }
    for (int64_t k = 0; k < n; k += kDeep) {
      const int64_t depth = std::min(kDeep, n - k);
      for (int64_t b = 0; b < f.B; b += kPanel<acc_t>) {
        const int64_t used = std::min<int64_t>(kPanel<acc_t>, f.B - b), width = width_of<acc_t>(used);
        pack_transposed(panel, width, xs + b * ldn + k, ldn, used, depth);
        multiply_panel<acc_t, false, false>(some_dc + b, Bp, false, f.A, width == kPanel<acc_t>,
                                            {z + k, ldn, panel, width, depth});
      }
      if (k == 0 && !more) {
        std::copy(some_dc, some_dc + f.A * Bp, own_dc);
      } else {
        add_to(own_dc, some_dc, f.A * Bp);
      }
    }
  }

  static void add_to(acc_t* to, const acc_t* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
};

// y or dx, and what the op gathers: with the base product, or onto it
template <typename Op>
void run_kron(Op& op, const Rows& rows) {
  if (!op.adds) return block_product(op, rows);
  const auto& p = op.p;
  at::parallel_for(0, rows.slots, 1, [&](int64_t b, int64_t e) {
    for (int64_t slot = b; slot < e; ++slot) {
      const int64_t row = slot * rows.per_slot;
      op.start(slot, row, std::min(p.M - row, rows.per_slot),
               reinterpret_cast<typename Op::acc_t*>(p.out) + row * p.N, p.N);
    }
  });
}

}  // namespace lorakern
