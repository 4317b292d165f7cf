// The products of a Hadamard update by torch, where its product is the faster one (linear.h): W + ΔW
// is made in blocks of what the product sums over, and dyᵀ x in tiles, each of which is consumed
// before the next. They are not for 16-bit, whose results would be rounded twice.

#pragma once

#include <atomic>

#include "hada_tile.h"
#include "outer_tiles.h"

namespace lorakern {

// sum[rows, cols] = W + ΔW from o and i, the first column of a panel; rows so few that W is read and
// sum written along them. right: of all panels.
template <typename acc_t>
void add_hada(const Hadamard<acc_t>& h, const std::vector<HadaRight<acc_t>>& right, const acc_t* w,
              int64_t o, int64_t rows, int64_t i, int64_t cols, acc_t* sum) {
  using Vec = at::vec::Vectorized<acc_t>;
  constexpr int64_t kWide = kPanel<acc_t>, kVec = kWidth<acc_t>;
  for (int64_t c = 0; c < cols; c += kWide) {
    const int64_t used = std::min(kWide, cols - c);
    hada_rows<acc_t, false>(
        h, o, rows, true, right[(i + c) / kWide],
        [&](int64_t row, int64_t lane, Vec one, Vec two) {
          const int64_t left = std::clamp<int64_t>(used - lane, 0, kVec);
          const acc_t* const from = w + row * h.I + i + c + lane;
          acc_t* const to = sum + (row - o) * cols + c + lane;
          // the next panels of many rows, which are far apart
          __builtin_prefetch(from + 2 * kWide);
          const Vec update = Vec(h.scale) * one * two;
          if (left == kVec) {
            (Vec::loadu(from) + update).store(to);
          } else {
            (Vec::loadu(from, left) + update).store(to, left);
          }
        });
  }
}

// visit(first, count, block): rows or columns of W + ΔW
template <typename acc_t, typename Visit>
void hada_blocks(const Hadamard<acc_t>& h, const at::Tensor& w, bool of_rows, const Visit& visit) {
  constexpr int64_t kWide = kPanel<acc_t>;
  std::vector<HadaRight<acc_t>> right;
  for (int64_t c = 0; c < h.I; c += kWide)
    right.emplace_back(h, false, c, std::min(kWide, h.I - c), kWide);
  const int64_t step = of_rows ? 1 : kWide;
  const int64_t all = of_rows ? h.O : h.I, across = of_rows ? h.I : h.O;
  const int64_t steps = (all + step - 1) / step;
  const int64_t fit = std::max<int64_t>(kRowsBytes / (across * sizeof(acc_t)) / step, 1);
  const int64_t blocks = (steps + fit - 1) / fit;
  const at::Tensor room = at::empty({(steps + blocks - 1) / blocks * step * across}, w.options());
  acc_t* const sums = room.mutable_data_ptr<acc_t>();
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * steps / blocks * step;
    const int64_t count = std::min(all, (block + 1) * steps / blocks * step) - first;
    const int64_t rows = of_rows ? count : h.O, cols = of_rows ? h.I : count;
    at::parallel_for(0, (rows + kTileRows - 1) / kTileRows, 1, [&](int64_t b, int64_t e) {
      for (int64_t row = b * kTileRows; row < std::min(rows, e * kTileRows); row += kTileRows)
        add_hada(h, right, w.const_data_ptr<acc_t>(), of_rows ? first + row : row,
                 std::min<int64_t>(kTileRows, rows - row), of_rows ? 0 : first, cols,
                 sums + row * cols);
    });
    visit(first, count, room.narrow(0, 0, rows * cols).view({rows, cols}));
  }
}

// y = x (W + ΔW)ᵀ + bias
template <typename scalar_t>
void hada_forward_by_torch(const Hadamard<scalar_t>& h, const at::Tensor& x, const at::Tensor& w,
                           const at::Tensor& bias, const at::Tensor& y) {
  const at::Tensor x_MI = x.view({-1, h.I});
  hada_blocks(h, w, false, [&](int64_t i, int64_t cols, const at::Tensor& block) {
    torch_product(y, x_MI.narrow(1, i, cols), block.t(), bias, i > 0);
  });
}

// dx = dy (W + ΔW)
template <typename scalar_t>
void hada_dx_by_torch(const Hadamard<scalar_t>& h, const at::Tensor& dy, const at::Tensor& w,
                      const at::Tensor& dx) {
  const at::Tensor dy_MO = dy.view({-1, h.O});
  hada_blocks(h, w, true, [&](int64_t o, int64_t rows, const at::Tensor& block) {
    torch_product(dx, dy_MO.narrow(1, o, rows), block, {}, o > 0);
  });
}

// outer_tiles by torch, each of one thread, in tiles that pack dy and x few times and that a core keeps
inline Tiles torch_tiles(int64_t O, int64_t I) { return Tiles(O, I, 320, 640); }

template <typename scalar_t, typename Visit>
void outer_tiles_by_torch(const Tiles& tiles, const at::Tensor& dy, const at::Tensor& x,
                          const Visit& visit) {
  const at::Tensor dy_MO = dy.view({-1, tiles.O}), x_MI = x.view({-1, tiles.I});
  const int64_t count = tiles.o_count * tiles.i_count;
  // a thread takes the next one when it is done: threads are seldom of one speed
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t tile; (tile = next++) < count;) {
      const auto [o_tile, i_tile, o, i, rows, cols] = tiles.at(tile);
      const at::Tensor g = at::mm(dy_MO.narrow(1, o, rows).t(), x_MI.narrow(1, i, cols));
      visit(o_tile, i_tile, o, rows, i, cols, g.mutable_data_ptr<scalar_t>(), cols);
    }
  });
}

}  // namespace lorakern
