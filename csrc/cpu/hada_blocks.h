// The products of a Hadamard update by torch, where its product is the faster one (linear.h): W + ΔW
// is made in blocks of rows and dyᵀ x in blocks of tiles, each of which is consumed before the next.
// They are not for 16-bit, whose results would be rounded twice.

#pragma once

#include "hada_tile.h"
#include "outer_tiles.h"

namespace lorakern {

// sum[rows, I] = W + ΔW of these rows from o, so few that W is read and sum written along them.
// right: the downs in panels, one's behind the other's.
template <typename acc_t>
void add_hada(const Hadamard<acc_t>& h, const acc_t* w, int64_t o, int64_t rows, acc_t* sum,
              const std::vector<acc_t>& right) {
  constexpr int64_t kWide = kPanel<acc_t>;
  const int64_t all = (h.I + kWide - 1) / kWide * kWide;
  acc_t one[kTileRows * kWide], two[kTileRows * kWide];
  for (int64_t c = 0; c < h.I; c += kWide) {
    const int64_t used = std::min(kWide, h.I - c);
    const auto multiply = [&](acc_t* made, const Pair<acc_t>& p, const acc_t* panels) {
      multiply_panel<acc_t, false, false>(made, kWide, false, rows, true,
                                          {p.up + o * p.R, p.R, panels + c * p.R, kWide, p.R});
    };
    multiply(one, h.first, right.data());
    multiply(two, h.second, right.data() + all * h.first.R);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < used; ++j)
        sum[r * h.I + c + j] =
            w[(o + r) * h.I + c + j] + h.scale * one[r * kWide + j] * two[r * kWide + j];
  }
}

// visit(o, rows, block): rows of W + ΔW from o
template <typename acc_t, typename Visit>
void hada_blocks(const Hadamard<acc_t>& h, const at::Tensor& w, const Visit& visit) {
  constexpr int64_t kWide = kPanel<acc_t>;
  const int64_t O = h.O, I = h.I, all = (I + kWide - 1) / kWide * kWide;
  std::vector<acc_t> right(all * (h.first.R + h.second.R));
  for (int64_t c = 0, R = h.first.R, S = h.second.R; c < I; c += kWide) {
    const int64_t used = std::min(kWide, I - c);
    pack_rows(right.data() + c * R, kWide, h.first.down + c, I, used, R);
    pack_rows(right.data() + all * R + c * S, kWide, h.second.down + c, I, used, S);
  }
  const int64_t fit = std::max<int64_t>(kRowsBytes / (I * sizeof(acc_t)), 1);
  const int64_t blocks = (O + fit - 1) / fit;
  const at::Tensor room = at::empty({(O + blocks - 1) / blocks, I}, w.options());
  acc_t* const sums = room.mutable_data_ptr<acc_t>();
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t o = block * O / blocks, rows = (block + 1) * O / blocks - o;
    at::parallel_for(0, (rows + kTileRows - 1) / kTileRows, 1, [&](int64_t b, int64_t e) {
      for (int64_t row = b * kTileRows; row < std::min(rows, e * kTileRows); row += kTileRows)
        add_hada(h, w.const_data_ptr<acc_t>(), o + row, std::min<int64_t>(kTileRows, rows - row),
                 sums + row * I, right);
    });
    visit(o, rows, room.narrow(0, 0, rows));
  }
}

// y = x (W + ΔW)ᵀ + bias
template <typename scalar_t>
void hada_forward_by_torch(const Hadamard<scalar_t>& h, const at::Tensor& x, const at::Tensor& w,
                           const at::Tensor& bias, const at::Tensor& y) {
  const at::Tensor y_MO = y.view({-1, h.O});
  hada_blocks(h, w, [&](int64_t o, int64_t rows, const at::Tensor& block) {
    torch_product(y_MO.narrow(1, o, rows), x, block.t(),
                  bias.defined() ? bias.narrow(0, o, rows) : at::Tensor());
  });
}

// dx = dy (W + ΔW)
template <typename scalar_t>
void hada_dx_by_torch(const Hadamard<scalar_t>& h, const at::Tensor& dy, const at::Tensor& w,
                      const at::Tensor& dx) {
  const at::Tensor dy_MO = dy.view({-1, h.O});
  hada_blocks(h, w, [&](int64_t o, int64_t rows, const at::Tensor& block) {
    torch_product(dx, dy_MO.narrow(1, o, rows), block, {}, o > 0);
  });
}

// visit as that of outer_tiles, of tiles that are made side by side: no more of them than a core keeps
template <typename scalar_t, typename Visit>
void outer_tiles_by_torch(const Tiles& tiles, const at::Tensor& dy, const at::Tensor& x,
                          const Visit& visit) {
  constexpr int64_t kFew = kFewBytes / sizeof(scalar_t);
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor dy_MO = dy.view({-1, tiles.O}), x_MI = x.view({-1, tiles.I});
  for (int64_t o_tile = 0, o_end; o_tile < tiles.o_count; o_tile = o_end) {
    const int64_t o = tiles.row(o_tile);
    o_end = o_tile + 1;
    while (o_end < tiles.o_count && (tiles.row(o_end + 1) - o) * tiles.I <= kFew) ++o_end;
    const int64_t rows = tiles.row(o_end) - o;
    for (int64_t i_tile = 0, i_end; i_tile < tiles.i_count; i_tile = i_end) {
      const int64_t i = tiles.column(i_tile);
      i_end = i_tile + 1;
      while (i_end < tiles.i_count && rows * (tiles.column(i_end + 1) - i) <= kFew) ++i_end;
      const int64_t cols = tiles.column(i_end) - i, across = i_end - i_tile;
      const at::Tensor made = at::mm(dy_MO.narrow(1, o, rows).t(), x_MI.narrow(1, i, cols));
      scalar_t* const g = made.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, (o_end - o_tile) * across, 1, [&](int64_t b, int64_t e) {
        for (int64_t n = b; n < e; ++n) {
          const auto [own_o, own_i, first, column, height, width] =
              tiles.at((o_tile + n / across) * tiles.i_count + i_tile + n % across);
          visit(own_o, own_i, first, height, column, width, g + (first - o) * cols + column - i,
                cols);
        }
      });
    }
  }
}

}  // namespace lorakern
