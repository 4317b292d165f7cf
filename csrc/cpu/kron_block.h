// What kron_linear does with a block of rows in cache. A row of x is a [B, Q] matrix and one of y is
// [A, P]: s·C (X Dᵀ) is what the sums of the base product start from, so that y is written once.
// Backward makes X Dᵀ again beside Cᵀ dY, and takes dC, dD and dx from them in the same pass over
// x and dy.

#pragma once

#include "block_product.h"
#include "kron.h"

namespace lorakern {

template <typename scalar_t, bool kPairs>
struct KronForward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  const Kron<acc_t>& f;
  // C times s
  const acc_t* scaled;
  Inner<acc_t>& turned;
  acc_t* room;
  int64_t room_size;

  static int64_t size(const Kron<acc_t>& f, int64_t block) {
    const int64_t Pp = padded<acc_t>(f.P), Rp = padded<acc_t>(f.R);
    return block * f.B * (f.Q + Pp + Rp) + f.A * Pp + 2 * kSlack<acc_t>;
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q, Pp = padded<acc_t>(f.P);
    acc_t* const x = room + slot * room_size;
    acc_t* const h = x + rows * I;
    acc_t* const y = h + rows * f.B * Pp + kSlack<acc_t>;
    widen(x, this->p.a + row * I, rows * I);
    turned.multiply(h, y + f.A * Pp + kSlack<acc_t>, x, f.Q, rows * f.B);
    for (int64_t m = 0; m < rows; ++m) {
      multiply_small<false>(y, scaled, f.B, f.A, h + m * f.B * Pp, Pp, f.B, f.P);
      copy_rows(sums + m * ld, y, f.A, f.P);
    }
  }
};

template <typename scalar_t, bool kPairs>
struct KronBackward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kStarts = true;
  const Kron<acc_t>& f;
  const scalar_t* x;
  // C times s
  const acc_t* scaled;
  Inner<acc_t>&turned, &straight;
  bool need_dx, need_dc, need_dd;
  // dd is dD, or dd_up and dd_down one after the other
  acc_t *room, *dc, *dd;
  int64_t room_size;

  static int64_t size(const Kron<acc_t>& f, int64_t block) {
    const int64_t Pp = padded<acc_t>(f.P), Qp = padded<acc_t>(f.Q), Rp = padded<acc_t>(f.R);
    return block * (f.A * f.P + f.B * (f.Q + 2 * Pp + 2 * Rp)) + (f.A + f.P) * padded<acc_t>(f.B) +
           f.B * Qp + dd_size(f) + 3 * kSlack<acc_t>;
  }
  static int64_t dd_size(const Kron<acc_t>& f) {
    return f.R ? f.P * padded<acc_t>(f.R) + f.R * padded<acc_t>(f.Q) : f.P * padded<acc_t>(f.Q);
  }

  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {
    const int64_t I = f.B * f.Q, O = f.A * f.P, Pp = padded<acc_t>(f.P), Bp = padded<acc_t>(f.B);
    acc_t* const dy = room + slot * room_size;
    acc_t* const xs = dy + rows * O + kSlack<acc_t>;
    acc_t* const h = xs + rows * I + kSlack<acc_t>;
    acc_t* const t = h + rows * f.B * Pp;
    const int64_t Rp = padded<acc_t>(f.R);
    // of a low rank: X downᵀ and T up
    acc_t* const s = t + rows * f.B * Pp;
    acc_t* const u = s + rows * f.B * Rp + kSlack<acc_t>;
    acc_t* const run = u + rows * f.B * Rp;
    acc_t* const block_dd = run + f.A * Bp;
    acc_t* const small = block_dd + dd_size(f);
    acc_t* const slot_dc = dc + slot * f.A * Bp;
    acc_t* const slot_dd = dd + slot * dd_size(f);
    widen(dy, this->p.a + row * O, rows * O);
    if (this->p.gain) {
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t o = 0; o < O; ++o) dy[m * O + o] *= this->p.gain[o];
    }
    if (need_dc || need_dd) widen(xs, x + row * I, rows * I);
    if (need_dc || (need_dd && f.R)) turned.multiply(h, s, xs, f.Q, rows * f.B);
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
    const int64_t all = rows * f.B;
    if (f.R && (need_dx || need_dd)) straight.steps[0].multiply(u, t, Pp, all);
    if (need_dd && f.R) {
      // dd_up += Tᵀ S, dd_down += Uᵀ X
      multiply_small<true>(block_dd, t, Pp, f.P, s, Rp, all, f.R);
      multiply_small<true>(block_dd + f.P * Rp, u, Rp, f.R, xs, f.Q, all, f.Q);
    } else if (need_dd) {
      // dD += Tᵀ X
      multiply_small<true>(block_dd, t, Pp, f.P, xs, f.Q, all, f.Q);
    }
    for (int64_t i = 0; need_dd && i < dd_size(f); ++i) slot_dd[i] += block_dd[i];
    const acc_t* const last = f.R ? u : t;
    const int64_t ld_last = f.R ? Rp : Pp;
    for (int64_t m = 0; need_dx && m < rows; ++m) {
      straight.steps.back().multiply(small, last + m * f.B * ld_last, ld_last, f.B);
      copy_rows(sums + m * ld, small, f.B, f.Q);
    }
  }
};

}  // namespace lorakern
