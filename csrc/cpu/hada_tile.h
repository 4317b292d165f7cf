// Tiles of a Hadamard update, delta = scale · (up1 down1) ∘ (up2 down2), made where they are used,
// and what a tile of its gradient gives to the four factors. Nothing of size O·I is made.

#pragma once

#include <vector>

#include "linear.h"
#include "parts.h"

namespace lorakern {

// One low-rank product up[O, R] down[R, I], in the type of the sums.
template <typename acc_t>
struct Pair {
  const acc_t *up, *down;
  int64_t R;
};

template <typename acc_t>
struct Hadamard {
  int64_t O, I;
  Pair<acc_t> first, second;
  acc_t scale;
  // the widened factors
  std::vector<at::Tensor> held;
};

template <typename scalar_t>
Hadamard<at::opmath_type<scalar_t>> hadamard(const at::Tensor& down1, const at::Tensor& up1,
                                             const at::Tensor& down2, const at::Tensor& up2,
                                             double scale) {
  using acc_t = at::opmath_type<scalar_t>;
  Hadamard<acc_t> h{up1.size(0), down1.size(1), {}, {}, static_cast<acc_t>(scale), {}};
  for (const at::Tensor* t : {&up1, &down1, &up2, &down2})
    h.held.push_back(t->to(c10::CppTypeToScalarType<acc_t>::value).contiguous());
  const auto of = [&](int i) { return h.held[i].template const_data_ptr<acc_t>(); };
  h.first = {of(0), of(1), down1.size(0)};
  h.second = {of(2), of(3), down2.size(0)};
  return h;
}

// rows of both products that fill the registers
constexpr int kHadaRows = kTileRows / 2;

// visit(row, lane, one, two): a vector of each product, of kRows rows from `row`, as is told below.
template <typename acc_t, int kRows, int kVecs, bool kTransposed, typename Visit>
inline void hada_tile(const Hadamard<acc_t>& h, int64_t row, const acc_t* first,
                      const acc_t* second, const Visit& visit) {
  using Vec = at::vec::Vectorized<acc_t>;
  Vec one[kRows][kVecs], two[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) one[i][j] = two[i][j] = Vec(acc_t(0));
  }
  const auto term = [&](const Pair<acc_t>& p, const acc_t* right) {
    return kTransposed
               ? Term<acc_t>{p.down + row, h.I, right, kVecs * kWidth<acc_t>, p.R}
               : Term<acc_t>{p.up + row * p.R, p.R, right, kVecs * kWidth<acc_t>, p.R};
  };
  accumulate<acc_t, kRows, kVecs, false, kTransposed>(one, term(h.first, first));
  accumulate<acc_t, kRows, kVecs, false, kTransposed>(two, term(h.second, second));
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) visit(row + i, j * kWidth<acc_t>, one[i][j], two[i][j]);
  }
}

// The right operands of a panel of `used` columns from `first` of both products, or of its rows.
template <typename acc_t>
struct HadaRight {
  std::vector<acc_t> panels;
  int64_t size;

  HadaRight(const Hadamard<acc_t>& h, bool transposed, int64_t from, int64_t used, int64_t width)
      : panels((h.first.R + h.second.R) * width), size(h.first.R * width) {
    acc_t* to = panels.data();
    for (const Pair<acc_t>* p : {&h.first, &h.second}) {
      if (transposed) {
        pack_transposed(to, width, p->up + from * p->R, p->R, used, p->R);
      } else {
        pack_rows(to, width, p->down + from, h.I, used, p->R);
      }
      to += p->R * width;
    }
  }
  const acc_t* first() const { return panels.data(); }
  const acc_t* second() const { return panels.data() + size; }
};

// visit(row, lane, one, two): a vector of each product, of all rows of a panel whose right operands
// are packed, from its column `lane`. transposed: rows are columns of the update, and the panel is of
// its rows.
template <typename acc_t, bool kTransposed, typename Visit>
void hada_rows(const Hadamard<acc_t>& h, int64_t row, int64_t rows, bool wide,
               const HadaRight<acc_t>& right, const Visit& visit) {
  const auto run = [&](auto height) {
    wide ? hada_tile<acc_t, height, 2, kTransposed>(h, row, right.first(), right.second(), visit)
         : hada_tile<acc_t, height, 1, kTransposed>(h, row, right.first(), right.second(), visit);
    row += height;
  };
  const int64_t end = row + rows;
  while (end - row >= kHadaRows) run(std::integral_constant<int, kHadaRows>{});
  if constexpr (kHadaRows > 4) {
    if ((end - row) & 4) run(std::integral_constant<int, 4>{});
  }
  if ((end - row) & 2) run(std::integral_constant<int, 2>{});
  if ((end - row) & 1) run(std::integral_constant<int, 1>{});
}

// visit as that of hada_rows: all rows of a panel
template <typename acc_t, typename Visit>
void hada_panel(const Hadamard<acc_t>& h, bool transposed, int64_t rows, int64_t from, int64_t used,
                int64_t width, const Visit& visit) {
  const HadaRight<acc_t> right(h, transposed, from, used, width);
  const auto run = transposed ? hada_rows<acc_t, true, Visit> : hada_rows<acc_t, false, Visit>;
  run(h, 0, rows, width == kPanel<acc_t>, right, visit);
}

// The gradients of the four factors, in parts: one of an up for each run of columns, one of a down
// for each run of rows. They are summed in order.
template <typename acc_t>
struct HadaGradients {
  const Hadamard<acc_t>& h;
  const acc_t* gains;
  std::array<at::Tensor, 2> up_parts, down_parts;

  // gains: [O] or null
  HadaGradients(const Hadamard<acc_t>& h, int64_t o_tiles, int64_t i_tiles, const acc_t* gains)
      : h(h), gains(gains) {
    const auto options = h.held[0].options();
    for (int i = 0; i < 2; ++i) {
      const int64_t R = i == 0 ? h.first.R : h.second.R;
      up_parts[i] = at::empty({i_tiles, h.O, padded<acc_t>(R)}, options);
      down_parts[i] = at::empty({o_tiles, R, padded<acc_t>(h.I)}, options);
    }
  }

  // g[rows, ld]: rows of dyᵀ x from o and `cols` columns from i
  void add(int64_t o_tile, int64_t i_tile, int64_t o, int64_t rows, int64_t i, int64_t cols,
           const acc_t* g, int64_t ld) const {
    using Vec = at::vec::Vectorized<acc_t>;
    constexpr int64_t kWide = kPanel<acc_t>;
    // so many that what a panel of them gives stays in L1
    constexpr int64_t kRows = 12 * kHadaRows;
    const Pair<acc_t>* pairs[2] = {&h.first, &h.second};
    acc_t hs[2][kRows * kWide];
    std::vector<acc_t> turned[2];
    for (int64_t c = 0; c < cols; c += kWide) {
      const int64_t used = std::min(kWide, cols - c), width = width_of<acc_t>(used);
      const HadaRight<acc_t> right(h, false, i + c, used, width);
      for (int k = 0; k < 2; ++k) {
        const int64_t R = pairs[k]->R;
        turned[k].resize(used * padded<acc_t>(R));
        for (int64_t r = 0; r < R; r += kWide)
          pack_transposed(turned[k].data() + r * used, width_of<acc_t>(R - r),
                          pairs[k]->down + r * h.I + i + c, h.I, std::min(kWide, R - r), used);
      }
      for (int64_t row = o; row < o + rows; row += kRows) {
        const int64_t some = std::min(kRows, o + rows - row);
        // the gradient of one product is that of the update times the other
        hada_rows<acc_t, false>(
            h, row, some, width == kWide, right,
            [&](int64_t at, int64_t lane, Vec one, Vec two) {
              const int64_t left = std::clamp<int64_t>(used - lane, 0, kWidth<acc_t>);
              const acc_t* const from = g + (at - o) * ld + c + lane;
              __builtin_prefetch(from + kWide);
              Vec by = left == kWidth<acc_t> ? Vec::loadu(from) : Vec::loadu(from, left);
              by = by * Vec(gains ? h.scale * gains[at] : h.scale);
              (by * two).store(hs[0] + (at - row) * width + lane);
              (by * one).store(hs[1] + (at - row) * width + lane);
            });
        for (int k = 0; k < 2; ++k) {
          const Pair<acc_t>& p = *pairs[k];
          const int64_t Rp = padded<acc_t>(p.R), Ip = padded<acc_t>(h.I);
          acc_t* const ddown = down_parts[k].template mutable_data_ptr<acc_t>();
          acc_t* const dup = up_parts[k].template mutable_data_ptr<acc_t>();
          multiply_panel<acc_t, false, true>(ddown + o_tile * p.R * Ip + i + c, Ip, row > o, p.R,
                                             width == kWide,
                                             {p.up + row * p.R, p.R, hs[k], width, some});
          for (int64_t r = 0; r < p.R; r += kWide) {
            const int64_t across = width_of<acc_t>(p.R - r);
            multiply_panel<acc_t, false, false>(
                dup + (i_tile * h.O + row) * Rp + r, Rp, c > 0, some, across == kWide,
                {hs[k], width, turned[k].data() + r * used, across, used});
          }
        }
      }
    }
  }

  // (down1, up1, down2, up2), each in scalar_t where it is wanted, else empty
  template <typename scalar_t>
  std::array<at::Tensor, 4> total(const bool* needs, at::TensorOptions like) const {
    std::array<at::Tensor, 4> grads;
    for (int k = 0; k < 2; ++k) {
      const int64_t R = k == 0 ? h.first.R : h.second.R;
      const auto finish = [&](bool need, const at::Tensor& parts, int64_t cols) {
        if (!need) return at::empty({0}, like);
        return sum_of_parts<scalar_t, acc_t>(parts.const_data_ptr<acc_t>(), parts.size(0),
                                             parts.stride(0), parts.size(1), parts.size(2), cols,
                                             1, like);
      };
      grads[2 * k] = finish(needs[2 * k], down_parts[k], h.I);
      grads[2 * k + 1] = finish(needs[2 * k + 1], up_parts[k], R);
    }
    return grads;
  }
};

}  // namespace lorakern
