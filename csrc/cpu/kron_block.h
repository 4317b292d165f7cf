// What kron_linear does with a block of rows in cache. A row of x is a [B, Q] matrix and one of y is
// [A, P]: s·C (X Dᵀ) is what the sums of the base product start from, so that y is written once.
// Backward makes X Dᵀ again beside Cᵀ dY, and takes dC, dD and dx from them in the same pass over
// x and dy. Or the base product is in the sums already, and all is added to it. A run of rows m stays
// in L1, laid out as [B][m, P], so that a product with C is one over all columns (m, p), and one with
// D is one over all rows m.

#pragma once

#include "block_product.h"
#include "kron.h"

namespace lorakern {

// rows of a run, of a slot's, by the floats of x or y
template <typename acc_t>
int64_t kron_run(const Kron<acc_t>& f, const Rows& rows) {
  constexpr int64_t kRunBytes = 32 << 10;
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
           (f.A + f.B) * padded<acc_t>(run * f.P) + kSlack<acc_t>;
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q;
    acc_t* const wide = room + slot * room_size;
    acc_t* const t = wide + most * I;
    acc_t* const part = t + most * f.R;
    acc_t* const h = part + most * kPanel<acc_t>;
    for (int64_t from = 0; from < rows; from += most) {
      const int64_t run = std::min(most, rows - from), n = run * f.P, ldn = padded<acc_t>(n);
      acc_t* const y = h + f.B * ldn + kSlack<acc_t>;
      const acc_t* const x = rows_of_x(wide, this->p.a + (row + from) * I, run * I);
      for (int64_t b = 0; b < f.B; ++b)
        turned.multiply(h + b * ldn, f.P, t, x + b * f.Q, I, run, part);
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
  static constexpr int64_t kDeep = 64, kKept = 4096;
  const Kron<acc_t>& f;
  const scalar_t* x;
  // C times s
  const acc_t* scaled;
  Inner<acc_t>&turned, &straight;
  bool need_dx, need_dc, need_dd, adds;
  // dd is dD, or dd_up and dd_down one after the other
  acc_t *room, *dc, *dd;
  int64_t room_size, most;

  static int64_t size(const Kron<acc_t>& f, int64_t run) {
    return run * (f.B * f.Q + 2 * f.B * f.R + kPanel<acc_t>) +
           (f.A + 2 * f.B) * padded<acc_t>(run * f.P) + 2 * f.A * padded<acc_t>(f.B) + dd_size(f) +
           kDeep * kPanel<acc_t> + 4 * kSlack<acc_t>;
  }
  static int64_t dd_size(const Kron<acc_t>& f) {
    return f.R ? f.P * padded<acc_t>(f.R) + f.R * padded<acc_t>(f.Q) : f.P * padded<acc_t>(f.Q);
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    acc_t* const own_dc = room + slot * room_size;
    acc_t* const own_dd = own_dc + f.A * padded<acc_t>(f.B);
    int64_t kept = 0;
    for (int64_t from = 0; from < rows; from += most) {
      const int64_t run = std::min(most, rows - from);
      start_run(own_dc, own_dd, kept > 0, row + from, run, sums + from * ld, ld);
      kept += run;
      if (kept * f.P < kKept && from + run < rows) continue;
      if (need_dc) add_to(dc + slot * f.A * padded<acc_t>(f.B), own_dc, own_dd - own_dc);
      if (need_dd) add_to(dd + slot * dd_size(f), own_dd, dd_size(f));
      kept = 0;
    }
  }

  // more: whether the own gradients, with room behind them, have sums of other runs
  void start_run(acc_t* own_dc, acc_t* own_dd, bool more, int64_t row, int64_t run, acc_t* sums,
                 int64_t ld) {
    const int64_t I = f.B * f.Q, O = f.A * f.P, n = run * f.P, ldn = padded<acc_t>(n);
    const int64_t Bp = padded<acc_t>(f.B), Rp = padded<acc_t>(f.R), Qp = padded<acc_t>(f.Q);
    acc_t* const some_dc = own_dd + dd_size(f);
    acc_t* const dy = some_dc + f.A * Bp;
    acc_t* const h = dy + f.A * ldn + kSlack<acc_t>;
    acc_t* const t = h + f.B * ldn;
    acc_t* const wide = t + f.B * ldn + kSlack<acc_t>;
    // of a low rank: X downᵀ and T up, [B][run, R]
    acc_t* const s = wide + run * I + kSlack<acc_t>;
    acc_t* const u = s + f.B * run * f.R;
    acc_t* const part = u + f.B * run * f.R + kSlack<acc_t>;
    acc_t* const panel = part + run * kPanel<acc_t>;
    for (int64_t m = 0; m < run; ++m)
      for (int64_t a = 0; a < f.A; ++a) {
        acc_t* const to = dy + a * ldn + m * f.P;
        const scalar_t* const from = this->p.a + (row + m) * O + a * f.P;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          copy_few(to, from, f.P);
        } else {
          widen(to, from, f.P);
        }
        for (int64_t p = 0; this->p.gain && p < f.P; ++p) to[p] *= this->p.gain[a * f.P + p];
      }
    const acc_t* xs = wide;
    if (need_dc || need_dd) {
      // past the end of its last row there is nothing to read
      if (std::is_same_v<scalar_t, acc_t> && (this->p.M - row - run) * I >= kPanel<acc_t>) {
        xs = reinterpret_cast<const acc_t*>(x + row * I);
      } else {
        widen(wide, x + row * I, run * I);
      }
    }
    if (need_dc || (need_dd && f.R)) {
      for (int64_t b = 0; b < f.B; ++b)
        turned.multiply(h + b * ldn, f.P, s + b * run * f.R, xs + b * f.Q, I, run, part);
    }
    // dC += dY Hᵀ over the columns (m, p)
    for (int64_t k = 0; need_dc && k < n; k += kDeep) {
      const int64_t depth = std::min(kDeep, n - k);
      for (int64_t b = 0; b < f.B; b += kPanel<acc_t>) {
        const int64_t used = std::min<int64_t>(kPanel<acc_t>, f.B - b);
        const int64_t width = used > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>;
        pack_transposed(panel, width, h + b * ldn + k, ldn, used, depth);
        multiply_panel<acc_t, false, false>(some_dc + b, Bp, false, f.A, width == kPanel<acc_t>,
                                            {dy + k, ldn, panel, width, depth});
      }
      if (k == 0 && !more) {
        std::copy(some_dc, some_dc + f.A * Bp, own_dc);
      } else {
        add_to(own_dc, some_dc, f.A * Bp);
      }
    }
    if (!need_dx && !need_dd) return;
    // T = s · Cᵀ dY
    multiply_all<true>(t, ldn, scaled, f.B, f.B, dy, ldn, f.A, n);
    for (int64_t b = 0; b < f.B; ++b) {
      const acc_t *last = t + b * ldn, *of_x = xs + b * f.Q;
      if (f.R) straight.steps[0].multiply(u + b * run * f.R, f.R, false, last, f.P, run, part);
      if (need_dd && f.R) {
        // dd_up += Tᵀ S, dd_down += Uᵀ X
        multiply_all<true>(own_dd, Rp, last, f.P, f.P, s + b * run * f.R, f.R, run, f.R,
                           more || b > 0);
        multiply_all<true>(own_dd + f.P * Rp, Qp, u + b * run * f.R, f.R, f.R, of_x, I, run, f.Q,
                           more || b > 0);
      } else if (need_dd) {
        // dD += Tᵀ X
        multiply_all<true>(own_dd, Qp, last, f.P, f.P, of_x, I, run, f.Q, more || b > 0);
      }
      if (f.R) last = u + b * run * f.R;
      if (need_dx)
        straight.steps.back().multiply(sums + b * f.Q, ld, adds, last, f.R ? f.R : f.P, run, part);
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
