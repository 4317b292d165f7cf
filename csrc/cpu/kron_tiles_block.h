// What kron_linear does with a block of rows where AMX tiles multiply bfloat16 (kron_tiles.h): what
// kron_block.h does, with every product in tiles. What lies between two of them is rounded to
// bfloat16, as the spec's products in it are; the last one is made in the sums of the base product.

#pragma once

#include <numeric>

#include "block_product.h"
#include "kron_tiles.h"

#if defined(LORAKERN_AMX)

namespace lorakern {

// floats of the sums of a run of rows, which stay in cache
constexpr int64_t kRunFloats = 1 << 14;

// A block goes through its room in runs of rows.
struct KronTilesBlock : Block<at::BFloat16, true> {
  static constexpr bool kStarts = true;
  // rows of a run, floats of a slot's room
  int64_t run, size;
  at::Tensor room;

  KronTilesBlock(const LowRank<at::BFloat16>& p, int64_t run, int64_t size)
      : Block{p}, run(run), size(size) {}
  void make_room(int64_t slots) { room = scratch<float>(slots * size, p.options); }

  // visit(row, rows, floats): each run of a block's rows
  template <typename Visit>
  void each_run(int64_t slot, int64_t row, int64_t rows, const Visit& visit) const {
    float* const floats = room.mutable_data_ptr<float>() + slot * size;
    for (int64_t from = 0; from < rows; from += run)
      visit(row + from, std::min(run, rows - from), floats);
  }
};

struct KronTilesForward : KronTilesBlock {
  static constexpr bool adds = false;
  const KronTiles& f;
  float scale;

  KronTilesForward(const LowRank<at::BFloat16>& p, const KronTiles& f, float scale)
      : KronTilesForward(p, f, scale, f.B * 16 * f.cols.count) {}

  void start(int64_t slot, int64_t row, int64_t rows, float* sums, int64_t ld) {
    amx::Shapes shapes;
    each_run(slot, row, rows, [&](int64_t m, int64_t count, float* h) {
      f.by_d(shapes, h, p.a + m * p.K, count);
      f.finish(shapes, sums + (m - row) * ld, ld, h, count, scale);
    });
  }

 private:
  KronTilesForward(const LowRank<at::BFloat16>& p, const KronTiles& f, float scale, int64_t h_row)
      : KronTilesBlock(p, std::max<int64_t>(kRunFloats / h_row, 1),
                       std::max(kRunFloats, h_row)),
        f(f), scale(scale) {}
};

// dX as forward has y, of turned factors: V = dY D, dX = s·Cᵀ V. Of V is dCᵀ = Σ X Vᵀ, and of
// T = Cᵀ dY is dDᵀ = Σ Xᵀ T.
struct KronTilesBackward : KronTilesBlock {
  // of Cᵀ [B, A] and Dᵀ [Q, P]
  const KronTiles& turned;
  const at::BFloat16* x;
  float scale;
  bool need_dx, need_dc, need_dd;
  int64_t A, B, P, Q;
  Cut a, b, across_p, q;
  // of each slot, tiles [b][a] of dCᵀ and [q][across_p] of dDᵀ
  at::Tensor dc, dd;

  KronTilesBackward(const LowRank<at::BFloat16>& p, const KronTiles& turned, const at::BFloat16* x,
                    float scale, bool need_dx, bool need_dc, bool need_dd)
      : KronTilesBlock(p, 0, 0), turned(turned), x(x), scale(scale), need_dx(need_dx),
        need_dc(need_dc), need_dd(need_dd), A(turned.B), B(turned.A), P(turned.Q), Q(turned.P),
        a(A), b(B), across_p(P), q(Q) {
    const int64_t row = 16 * std::max(q.count * A, across_p.count * B);
    // rows whose pairs fill the lanes of dD
    const int64_t whole = 2 * kTall / std::gcd(2 * kTall, B);
    run = std::max<int64_t>(kRunFloats / row / whole, 1) * whole;
    size = std::max(v_size() + a.count * run * Q / 2 * 16,
                    across_p.count * (run * A / 2 + tall(run) * 32) * 16 + q.count * tall(run) * 256);
  }

  void make_room(int64_t slots) {
    KronTilesBlock::make_room(slots);
    dc = scratch<float>(slots * b.count * a.count * 256, p.options).zero_();
    dd = scratch<float>(slots * q.count * across_p.count * 256, p.options).zero_();
  }

  void start(int64_t slot, int64_t row, int64_t rows, float* sums, int64_t ld) {
    amx::Shapes shapes;
    each_run(slot, row, rows, [&](int64_t m, int64_t count, float* floats) {
      const at::BFloat16 *const dy = p.a + m * p.K, *const xs = x + m * B * Q;
      if (need_dx || need_dc) turned.by_d(shapes, floats, dy, count);
      if (need_dc) add_dc(shapes, slot, floats, xs, count);
      if (need_dx) turned.finish(shapes, sums + (m - row) * ld, ld, floats, count, scale);
      if (need_dd) add_dd(shapes, slot, floats, dy, xs, count);
    });
  }

 private:
  static constexpr int64_t kTall = amx::kSide;
  // the sums of dD over rows of X, in steps of tiles
  int64_t tall(int64_t count) const { return (count * B + 2 * kTall - 1) / (2 * kTall); }
  // a tile of a low A reaches beyond the last row
  int64_t v_size() const { return (q.count * run * A + kTall) * 16; }

  void add_dc(amx::Shapes& shapes, int64_t slot, float* v, const at::BFloat16* xs,
              int64_t count) const {
    // Vᵀ of each row and 16 of A: pairs [Q / 2, 16]
    float* const pairs = v + v_size();
    for (int64_t i = 0; i < a.count; ++i)
      for (int64_t m = 0; m < count; ++m)
        for (int64_t j = 0; j < q.count; ++j)
          turn_sums(pairs + ((i * count + m) * Q + q.at(j)) / 2 * 16,
                    v + ((j * count + m) * A + a.at(i)) * 16, q.side / 2);
    float* const sums = dc.mutable_data_ptr<float>() + slot * b.count * a.count * 256;
    const Steps steps(Q / 2);
    const auto* const lanes = reinterpret_cast<const float*>(xs);
    const int64_t depth = Q / 2;
    shapes.set(b.side, b.side, steps.length);
    multiply_tiles(
        b.count, a.count,
        {count, steps.count, 4 * depth, B * depth, steps.length, depth * 16, steps.length * 16},
        true, [=, b = b](int64_t i) { return lanes + b.at(i) * depth; },
        [=](int64_t j) { return pairs + j * count * depth * 16; }, 64,
        [=, width = a.count](int64_t i, int64_t j) { return sums + (i * width + j) * 256; });
  }

  void add_dd(amx::Shapes& shapes, int64_t slot, float* pairs, const at::BFloat16* dy,
              const at::BFloat16* xs, int64_t count) const {
    const int64_t steps = tall(count), height = steps * 2 * kTall;
    float* const t = pairs + across_p.count * count * A / 2 * 16;
    float* const left = t + across_p.count * height * 16;
    for (int64_t j = 0; j < across_p.count; ++j) {
      pair_rows(pairs + j * count * A / 2 * 16, dy + across_p.at(j), P, count * A, across_p.side);
      std::fill(t + (j * height + count * B) * 16, t + (j + 1) * height * 16, 0.f);
    }
    turned.by_c(
        shapes, pairs, count, across_p.count, kTall, 64,
        [=, B = B](int64_t m, int64_t b, int64_t j) { return t + (j * height + m * B + b) * 16; });
    pair_sums(t, across_p.count * height, 1);
    for (int64_t i = 0; i < q.count; ++i)
      for (int64_t k = 0; k < steps; ++k)
        turn_rows(left + (i * steps + k) * 256, xs + k * 2 * kTall * Q + q.at(i), Q,
                  std::min(2 * kTall, count * B - k * 2 * kTall), q.side);
    float* const sums = dd.mutable_data_ptr<float>() + slot * q.count * across_p.count * 256;
    shapes.set(q.side, q.side);
    multiply_tiles(
        q.count, across_p.count, {1, steps, 64, 0, 256, 0, 256}, true,
        [=](int64_t i) { return left + i * steps * 256; },
        [=](int64_t j) { return t + j * height * 8; }, 64,
        [=, width = across_p.count](int64_t i, int64_t j) { return sums + (i * width + j) * 256; });
  }

};

// [columns, rows] of the sum over slots of tiles [rows][columns] of the turned matrix
inline at::Tensor turned_sum(const at::Tensor& tiles, const Cut& rows, const Cut& columns) {
  const int64_t size = rows.count * columns.count * 256;
  at::Tensor sum = at::empty({columns.n, rows.n}, tiles.options());
  const float* const from = tiles.const_data_ptr<float>();
  float* const to = sum.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows.n; ++i)
    for (int64_t j = 0; j < columns.n; ++j) {
      const int64_t row = i / amx::kSide, column = j / amx::kSide;
      const int64_t at = (row * columns.count + column) * 256 + (i - rows.at(row)) * 16 + j -
                         columns.at(column);
      float total = 0;
      for (int64_t slot = at; slot < tiles.numel(); slot += size) total += from[slot];
      to[j * rows.n + i] = total;
    }
  return sum;
}

}  // namespace lorakern

#endif
