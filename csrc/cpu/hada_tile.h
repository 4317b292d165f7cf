// Tiles of a Hadamard update, delta = scale · (up1 down1) ∘ (up2 down2), made where they are used,
// and what a tile of its gradient gives to the four factors. Nothing of size O·I is made.

#pragma once

#include <vector>

#include "linear.h"

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

// rows that a pair of products is made of at a time
constexpr int64_t kHadaRows = 64;

// visit(row, rows, one, two): the two products, [rows, width], of all rows of a panel's columns from
// `first`. transposed: rows are columns of the update, and the panel is of its rows.
template <typename acc_t, typename Visit>
void hada_panel(const Hadamard<acc_t>& h, bool transposed, int64_t row0, int64_t row_count,
                int64_t first, int64_t used, int64_t width, const Visit& visit) {
  const bool wide = width == kPanel<acc_t>;
  const Pair<acc_t>* pairs[2] = {&h.first, &h.second};
  std::vector<acc_t> room((h.first.R + h.second.R) * width + 2 * kHadaRows * width);
  acc_t* right[2] = {room.data(), room.data() + h.first.R * width};
  acc_t* made[2] = {right[1] + h.second.R * width,
                    right[1] + h.second.R * width + kHadaRows * width};
  for (int i = 0; i < 2; ++i) {
    const Pair<acc_t>& p = *pairs[i];
    if (transposed) {
      pack_transposed(right[i], width, p.up + first * p.R, p.R, used, p.R);
    } else {
      pack_rows(right[i], width, p.down + first, h.I, used, p.R);
    }
  }
  for (int64_t row = row0; row < row0 + row_count; row += kHadaRows) {
    const int64_t rows = std::min(kHadaRows, row0 + row_count - row);
    for (int i = 0; i < 2; ++i) {
      const Pair<acc_t>& p = *pairs[i];
      if (transposed) {
        multiply_panel<acc_t, false, true>(made[i], width, false, rows, wide,
                                           {p.down + row, h.I, right[i], width, p.R});
      } else {
        multiply_panel<acc_t, false, false>(made[i], width, false, rows, wide,
                                            {p.up + row * p.R, p.R, right[i], width, p.R});
      }
    }
    visit(row, rows, made[0], made[1]);
  }
}

// The gradients of the four factors, in parts: one of an up for each run of columns, one of a down
// for each run of rows. They are summed in order.
template <typename acc_t>
struct HadaGradients {
  const Hadamard<acc_t>& h;
  int64_t o_tiles, i_tiles;
  std::array<at::Tensor, 2> up_parts, down_parts;

  HadaGradients(const Hadamard<acc_t>& h, int64_t o_tiles, int64_t i_tiles)
      : h(h), o_tiles(o_tiles), i_tiles(i_tiles) {
    const auto options = h.held[0].options();
    for (int i = 0; i < 2; ++i) {
      const int64_t R = i == 0 ? h.first.R : h.second.R;
      up_parts[i] = at::empty({i_tiles, h.O, padded<acc_t>(R)}, options);
      down_parts[i] = at::empty({o_tiles, R, padded<acc_t>(h.I)}, options);
    }
  }

  // g[rows, ld]: the gradient of the update times scale, rows from o and `cols` columns from i
  void add(int64_t o_tile, int64_t i_tile, int64_t o, int64_t rows, int64_t i, int64_t cols,
           const acc_t* g, int64_t ld) const {
    constexpr int64_t kWide = kPanel<acc_t>;
    const Pair<acc_t>* pairs[2] = {&h.first, &h.second};
    std::vector<acc_t> flipped(kWide * kWide), product(2 * rows * kWide);
    acc_t* hs[2] = {product.data(), product.data() + rows * kWide};
    for (int64_t c = 0; c < cols; c += kWide) {
      const int64_t used = std::min(kWide, cols - c);
      const int64_t width = used > kWidth<acc_t> ? kWide : kWidth<acc_t>;
      // the gradient of one product is g times the other
      hada_panel(h, false, o, rows, i + c, used, width,
                 [&](int64_t row, int64_t n, const acc_t* one, const acc_t* two) {
                   for (int64_t r = 0; r < n; ++r) {
                     const int64_t at = (row - o + r) * width;
                     const acc_t* from = g + (row - o + r) * ld + c;
                     for (int64_t j = 0; j < used; ++j) {
                       hs[0][at + j] = from[j] * two[r * width + j];
                       hs[1][at + j] = from[j] * one[r * width + j];
                     }
                     for (int64_t j = used; j < width; ++j) hs[0][at + j] = hs[1][at + j] = 0;
                   }
                 });
      for (int k = 0; k < 2; ++k) {
        const Pair<acc_t>& p = *pairs[k];
        const int64_t Rp = padded<acc_t>(p.R), Ip = padded<acc_t>(h.I);
        acc_t* ddown = down_parts[k].template mutable_data_ptr<acc_t>() + o_tile * p.R * Ip + i + c;
        acc_t* dup = up_parts[k].template mutable_data_ptr<acc_t>() + (i_tile * h.O + o) * Rp;
        multiply_panel<acc_t, false, true>(ddown, Ip, false, p.R, width == kWide,
                                           {p.up + o * p.R, p.R, hs[k], width, rows});
        for (int64_t r = 0; r < p.R; r += kWide) {
          const int64_t ranks = std::min(kWide, p.R - r);
          const int64_t across = ranks > kWidth<acc_t> ? kWide : kWidth<acc_t>;
          pack_transposed(flipped.data(), across, p.down + r * h.I + i + c, h.I, ranks, used);
          multiply_panel<acc_t, false, false>(dup + r, Rp, c > 0, rows, across == kWide,
                                              {hs[k], width, flipped.data(), across, used});
        }
      }
    }
  }

  // (down1, up1, down2, up2), each in `like`'s dtype where it is wanted, else empty
  std::array<at::Tensor, 4> total(const bool* needs, at::TensorOptions like) const {
    std::array<at::Tensor, 4> grads;
    for (int k = 0; k < 2; ++k) {
      const int64_t R = k == 0 ? h.first.R : h.second.R;
      const auto finish = [&](bool need, const at::Tensor& parts, int64_t cols) {
        if (!need) return at::empty({0}, like);
        at::Tensor sum = parts[0].clone();
        for (int64_t part = 1; part < parts.size(0); ++part) sum.add_(parts[part]);
        return sum.narrow(1, 0, cols).contiguous().to(like.dtype());
      };
      grads[2 * k] = finish(needs[2 * k], down_parts[k], h.I);
      grads[2 * k + 1] = finish(needs[2 * k + 1], up_parts[k], R);
    }
    return grads;
  }
};

}  // namespace lorakern
