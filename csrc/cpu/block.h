// What block_product (block_product.h) runs on: its operands, how rows are shared, and the Block that
// says what is done with them.

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "pack.h"

namespace lorakern {

// sizes of what is reused: packed columns in L3, rows of a in L2, depth of a pass over the panels
constexpr int64_t kGroupBytes = 16 << 20;
constexpr int64_t kBlockBytes = 384 << 10;
constexpr int64_t kDepth = 2048;
// what a core keeps at hand of panels of its own, and of rows that are few
constexpr int64_t kOwnBytes = 640 << 10;
constexpr int64_t kFewBytes = 1 << 20;
// multiply-adds below which a second thread costs more than it brings
constexpr int64_t kSerial = 1 << 17;

template <typename scalar_t>
struct LowRank {
  int64_t M, K, N, R;
  const scalar_t *a, *wide, *shrink, *expand, *bias;
  // transposed: wide is [N, K], shrink [R, K], expand [N, R]; else [K, N], [K, R], [R, N]
  bool transposed;
  scalar_t* out;
  at::TensorOptions options;
  // [N] in the sum's epilogue when transposed, else [K] on the rows of W and S; may be null
  const at::opmath_type<scalar_t>* gain = nullptr;
};

// How M rows are shared: a slot is one thread's run of neighbouring rows, cut in blocks of no more
// than fit in its cache.
struct Rows {
  int64_t slots, per_slot, block, fit;

  // k: lanes of a row that are kept in cache; work: multiply-adds of the whole product
  Rows(int64_t M, int64_t k, int64_t lane_bytes, int64_t work, int64_t height = kTileRows) {
    const int64_t tiles = (M + kTileRows - 1) / kTileRows;
    const int64_t threads = work < kSerial ? 1 : at::get_num_threads();
    const int64_t runs = std::clamp<int64_t>(threads, 1, tiles);
    per_slot = (M + runs - 1) / runs;
    slots = (M + per_slot - 1) / per_slot;
    const int64_t rows = kBlockBytes / (lane_bytes * std::clamp<int64_t>(k, 1, kDepth));
    fit = std::max<int64_t>(rows / height, 1) * height;
    block = std::min(per_slot, fit);
  }
};

// Lanes of rows of a, `lda` apart, and the first lane of a panel that they meet.
template <typename acc_t>
struct Lanes {
  int64_t from, depth;
  const acc_t* a;
  int64_t lda;
};

// Where a row of an output goes on from a column: the columns left of it there, and from row to row.
template <typename scalar_t>
struct Place {
  scalar_t* out;
  int64_t ld, left;
};

// What a product does with its operands and sums; a class derived from it hides what it does in
// another way. acc_t lanes: see tile.h.
template <typename scalar_t_, bool kPairs_>
struct Block {
  using scalar_t = scalar_t_;
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kPairs = kPairs_;
  // start() gives each sum a first value
  static constexpr bool kStarts = false;
  // store() puts the sums into out and no more
  static constexpr bool kPlainStore = true;
  LowRank<scalar_t> p;

  int64_t lanes() const { return kPairs ? p.K / 2 : p.K; }
  // whether rows of a are multiplied where they lie
  bool direct() const { return kPairs || std::is_same_v<scalar_t, acc_t>; }

  // panel[lanes, width] of W from column `first`
  void pack(acc_t* panel, int64_t first, int64_t width) const {
    pack_panel<kPairs>(panel, p.wide, p.transposed, p.K, p.N, first, width);
    scale_rows(panel, width);
  }
  // by the gain that is on a; an op of pairs has its own way
  void scale_rows(acc_t* panel, int64_t width) const {
    if (kPairs || p.transposed || !p.gain) return;
    for (int64_t k = 0; k < p.K; ++k)
      for (int64_t j = 0; j < width; ++j) panel[k * width + j] *= p.gain[k];
  }

  // whether sums are made in out itself, of a block's whole panels
  bool in_place() const {
    return std::is_same_v<scalar_t, acc_t> && !(p.transposed && p.gain);
  }

  Place<scalar_t> place(int64_t row, int64_t col) const {
    return {p.out + row * p.N + col, p.N, p.N - col};
  }

  // rows of a in lanes; room for them when they are not direct
  const acc_t* load(acc_t* room, int64_t row, int64_t rows) const {
    if (direct()) return reinterpret_cast<const acc_t*>(p.a) + row * lanes();
    widen(room, p.a + row * p.K, rows * p.K);
    return room;
  }

  // the lanes of a row of t
  int64_t t_lanes() const { return padded<acc_t>(p.R); }
  // S in panels: how many, and the i-th of them
  int64_t shrinks() const { return (p.R + kPanel<acc_t> - 1) / kPanel<acc_t>; }
  void pack_shrink(acc_t* shrink, int64_t i) const {
    const int64_t first = i * kPanel<acc_t>, width = width_of<acc_t>(p.R - first);
    pack_panel<kPairs>(shrink + first * lanes(), p.shrink, p.transposed, p.K, p.R, first, width);
    scale_rows(shrink + first * lanes(), width);
  }
  // t[rows, t_lanes()] (+)= a S
  void shrink(acc_t* t, const acc_t* a, const acc_t* shrink, int64_t, int64_t rows,
              bool add = false) const {
    for (int64_t r = 0; r < p.R; r += kPanel<acc_t>) {
      const int64_t width = width_of<acc_t>(p.R - r);
      multiply_panel<acc_t, kPairs, false>(t + r, t_lanes(), add, rows, width == kPanel<acc_t>,
                                           {a, lanes(), shrink + r * lanes(), width, lanes()});
    }
  }

  // the lanes of a column of E
  int64_t expand_lanes() const { return kPairs ? padded<acc_t>(p.R) : p.R; }
  // panel[expand_lanes(), width] of E from column `first`, and the product of t with it
  void pack_expand(acc_t* panel, int64_t first, int64_t width) const {
    pack_update<kPairs>(panel, p.expand, p.transposed, p.R, p.N, first, width);
  }
  Term<acc_t> update(const acc_t* t, const acc_t* panel, int64_t, int64_t width) const {
    return {t, t_lanes(), panel, width, expand_lanes()};
  }

  // the passes over K, and the lanes of one: where they are in a panel and in rows of a
  int64_t passes() const { return lanes() > kDepth ? (lanes() + kDepth - 1) / kDepth : 1; }
  Lanes<acc_t> pass(int64_t i, const acc_t* a, int64_t, int64_t) const {
    const int64_t from = i * kDepth, last = passes() - 1;
    return {from, i == last ? lanes() - from : kDepth, a + from, lanes()};
  }

  // c[rows, a panel's width] (+)= the product of a pass, and of the last one the update
  void multiply(acc_t* c, int64_t ldc, bool add, int64_t rows, bool wide, const Term<acc_t>& product,
                const Term<acc_t>& update) const {
    multiply_panel<acc_t, kPairs, false>(c, ldc, add, rows, wide, product, update);
  }

  // whether all passes over a panel come before the next panel
  bool by_panel() const { return false; }

  // once a block, in order within a slot: t[rows, t_lanes()] = a S, which it may change
  void visit(int64_t slot, int64_t row, int64_t rows, const acc_t* a, acc_t* t) {}

  // sums[rows, ld]: all columns of a block
  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {}

  // sums[rows, ld] of the `used` columns from col, finished
  void store(int64_t slot, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) {
    if (static_cast<const void*>(sums) == p.out + row * p.N + col && !p.bias) return;
    using Vec = at::vec::Vectorized<acc_t>;
    acc_t bias[kPanel<acc_t>], gain[kPanel<acc_t>] = {};
    if (p.bias) widen(bias, p.bias + col, used);
    const bool gains = p.transposed && p.gain;
    if (gains) std::copy(p.gain + col, p.gain + col + used, gain);
    for (int64_t i = 0; i < rows; ++i) {
      acc_t* const sum = sums + i * ld;
      for (int64_t j = 0; gains && j < used; j += Vec::size())
        (Vec::loadu(sum + j) * Vec::loadu(gain + j)).store(sum + j);
      narrow(p.out + (row + i) * p.N + col, sum, p.bias ? bias : nullptr, used);
    }
  }
};

// S, and pack(i) of `count` panels, shared by the threads of several slots
template <typename Op, typename Pack>
void pack_shared(const Op& op, typename Op::acc_t* shrink, int64_t shrinks, int64_t count,
                 int64_t slots, const Pack& pack) {
  const int64_t all = shrinks + count;
  at::parallel_for(0, all, slots > 1 ? 1 : all + 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) i < shrinks ? op.pack_shrink(shrink, i) : pack(i - shrinks);
  });
}

// bfloat16 pairs are multiplied as they are when a row holds a whole number of them
template <typename scalar_t, typename Run>
void with_pairs(int64_t k, const Run& run) {
  if constexpr (kHasPairs && std::is_same_v<scalar_t, at::BFloat16>) {
    if (k % 2 == 0) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <typename Op>
Rows rows_of(const Op& op) {
  const int64_t lanes = Op::kPairs ? op.p.K / 2 : op.p.K;
  return Rows(op.p.M, lanes, sizeof(typename Op::acc_t), op.p.M * op.p.N * op.p.K,
              kHeight<Op::kPairs>);
}

}  // namespace lorakern
