// dyᵀ x [O, I] in tiles that stay in cache and are consumed there: it is never in memory whole.
//
// A tile sums over all rows, in runs of kOuterRows: a run of dy is packed once and meets the panels
// of x of the same rows. Tiles are shared by the threads; each is the same on any number of them.

#pragma once

#include <vector>

#include "amx_pairs.h"
#include "linear.h"

namespace lorakern {

constexpr int64_t kOuterRows = 128;

// A matrix cut into tiles of nearly equal sides; columns are cut at whole panels, so that a tile's
// padded sums never reach into the next, and rows at multiples of `step`.
struct Tiles {
  static constexpr int64_t kColumns = 32;
  int64_t O, I, step, o_count, i_count;

  Tiles(int64_t O, int64_t I, int64_t rows = 160, int64_t columns = 320, int64_t step = 1)
      : O(O), I(I), step(step) {
    o_count = (O + rows - 1) / rows;
    i_count = (I + columns - 1) / columns;
    // enough of them to share
    const int64_t wanted = at::get_num_threads() > 2 ? 3 * at::get_num_threads() : 2;
    while (o_count * i_count < wanted && (O / o_count > 32 || I / i_count > 2 * kColumns)) {
      O / o_count > 32 && 2 * (O / o_count) > I / i_count ? ++o_count : ++i_count;
    }
  }
  int64_t row(int64_t tile) const {
    return std::min(O, tile * ((O + step - 1) / step) / o_count * step);
  }
  int64_t column(int64_t tile) const {
    const int64_t panels = (I + kColumns - 1) / kColumns;
    return std::min(I, tile * panels / i_count * kColumns);
  }
  // (o_tile, i_tile, o, i, rows, cols) of one of all
  std::array<int64_t, 6> at(int64_t tile) const {
    const int64_t o_tile = tile / i_count, i_tile = tile % i_count;
    const int64_t o = row(o_tile), i = column(i_tile);
    return {o_tile, i_tile, o, i, row(o_tile + 1) - o, column(i_tile + 1) - i};
  }
};

// visit(o_tile, i_tile, o, rows, i, cols, g, ld): one tile, which it may change
template <typename scalar_t, bool kPairs, typename Visit>
void outer_tiles(const Tiles& tiles, const scalar_t* dy, const scalar_t* x, int64_t M,
                 const Visit& visit) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int64_t kWide = kPanel<acc_t>;
  at::parallel_for(0, tiles.o_count * tiles.i_count, 1, [&](int64_t b, int64_t e) {
    std::vector<acc_t> g, run, panel(kOuterRows * kWide);
    for (int64_t tile = b; tile < e; ++tile) {
      const auto [o_tile, i_tile, o, i, rows, cols] = tiles.at(tile);
      const int64_t ld = padded<acc_t>(cols);
      g.resize(rows * ld);
      run.resize(kOuterRows * rows);
      for (int64_t m = 0; m < M; m += kOuterRows) {
        const int64_t depth = std::min(kOuterRows, M - m);
        const int64_t lanes = kPairs ? (depth + 1) / 2 : depth;
        if constexpr (kPairs) {
          pack_row_pairs(run.data(), rows, dy + m * tiles.O + o, tiles.O, rows, depth);
        } else {
          pack_rows(run.data(), rows, dy + m * tiles.O + o, tiles.O, rows, depth);
        }
        for (int64_t c = 0; c < cols; c += kWide) {
          const int64_t used = std::min(kWide, cols - c);
          const int64_t width = used > kWidth<acc_t> ? kWide : kWidth<acc_t>;
          const scalar_t* from = x + m * tiles.I + i + c;
          if constexpr (kPairs) {
            pack_row_pairs(panel.data(), width, from, tiles.I, used, depth);
          } else {
            pack_rows(panel.data(), width, from, tiles.I, used, depth);
          }
          multiply_panel<acc_t, kPairs, true>(g.data() + c, ld, m > 0, rows, width == kWide,
                                              {run.data(), rows, panel.data(), width, lanes});
        }
      }
      visit(o_tile, i_tile, o, rows, i, cols, g.data(), ld);
    }
  });
}

#if defined(LORAKERN_AMX)
// The same in AMX tiles: dy is turned once a run, and runs are long and tiles large, which packs dy
// and x fewer times and keeps sums in registers longer.
constexpr int64_t kAmxRun = 512;

inline Tiles amx_tiles(int64_t O, int64_t I) { return Tiles(O, I, 640, 320, Tiles::kColumns); }

template <typename Visit>
void outer_amx_tiles(const Tiles& tiles, const at::BFloat16* dy, const at::BFloat16* x, int64_t M,
                     const Visit& visit) {
  constexpr int64_t kWide = kPanel<float>, kLanes = kAmxRun / 2;
  // turned rows are apart by a line more, or many were in the same lines of a cache
  constexpr int64_t kTurned = kLanes + amx::kSide;
  at::parallel_for(0, tiles.o_count * tiles.i_count, 1, [&](int64_t b, int64_t e) {
    std::vector<float> g, run, panel(kLanes * kWide);
    for (int64_t tile = b; tile < e; ++tile) {
      const auto [o_tile, i_tile, o, i, rows, cols] = tiles.at(tile);
      const int64_t ld = padded<float>(cols);
      g.resize(rows * ld);
      run.resize(padded<float>(rows) * kTurned);
      amx::Shapes shapes;
      for (int64_t m = 0; m < M; m += kAmxRun) {
        const int64_t depth = std::min(kAmxRun, M - m);
        pack_turned_pairs(run.data(), kTurned, dy + m * tiles.O + o, tiles.O, rows, depth);
        for (int64_t c = 0; c < cols; c += kWide) {
          const int64_t used = std::min(kWide, cols - c);
          const int64_t width = used > kWidth<float> ? kWide : kWidth<float>;
          pack_row_pairs(panel.data(), width, x + m * tiles.I + i + c, tiles.I, used, depth);
          const Term<float> term{run.data(), kTurned, panel.data(), width, (depth + 1) / 2};
          amx::multiply_panel<false>(shapes, g.data() + c, ld, m > 0, rows, width == kWide, term,
                                     {});
        }
      }
      visit(o_tile, i_tile, o, rows, i, cols, g.data(), ld);
    }
  });
}
#endif

}  // namespace lorakern
