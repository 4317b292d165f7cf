// out[M, N] = a[M, K] W + t[M, R] E (+ bias), with t = a S: a product and its update.
//
// Forward of lora_linear is a = x, W = weightᵀ, S = downᵀ, E = upᵀ; the gradient of x is a = dy,
// W = weight, S = up, E = down. Rows go in blocks that stay in cache: t, both products and the sum
// of a block happen there, in one accumulator, and out is written once. Nothing of size M·N or M·K
// is made. W is packed once a call, in groups of columns of at most kGroupBytes.
//
// An op says what is its own in a class derived from Block: how W is packed (hada adds ΔW), what a
// sum starts from (kron), what is done with t and with a finished sum (gain, gradients of factors).

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
  // [N] in the sum's epilogue when transposed, else [K] on a; may be null
  const at::opmath_type<scalar_t>* gain = nullptr;
};

// How M rows are shared: a slot is one thread's run of neighbouring rows, cut in blocks.
struct Rows {
  int64_t slots, per_slot, block;

  // k: lanes of a row that are kept in cache; work: multiply-adds of the whole product
  Rows(int64_t M, int64_t k, int64_t lane_bytes, int64_t work, int64_t height = kTileRows) {
    const int64_t tiles = (M + kTileRows - 1) / kTileRows;
    const int64_t threads = work < kSerial ? 1 : at::get_num_threads();
    const int64_t runs = std::clamp<int64_t>(threads, 1, tiles);
    per_slot = (M + runs - 1) / runs;
    slots = (M + per_slot - 1) / per_slot;
    const int64_t fit = kBlockBytes / (lane_bytes * std::clamp<int64_t>(k, 1, kDepth));
    block = std::min(per_slot, std::max<int64_t>(fit / height, 1) * height);
  }
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
  bool direct() const {
    return (kPairs || std::is_same_v<scalar_t, acc_t>)&&(p.transposed || !p.gain);
  }

  // panel[lanes, width] of W from column `first`
  void pack(acc_t* panel, int64_t first, int64_t width) const {
    pack_panel<kPairs>(panel, p.wide, p.transposed, p.K, p.N, first, width);
  }

  // whether sums are made in out itself, of a block's whole panels
  bool in_place() const {
    return std::is_same_v<scalar_t, acc_t> && !(p.transposed && p.gain);
  }

  // rows of a in lanes; room for them when they are not direct
  const acc_t* load(acc_t* room, int64_t row, int64_t rows) const {
    if (direct()) return reinterpret_cast<const acc_t*>(p.a) + row * lanes();
    widen(room, p.a + row * p.K, rows * p.K);
    if (!p.transposed && p.gain) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < p.K; ++k) room[i * p.K + k] *= p.gain[k];
    }
    return room;
  }

  // once a block, in order within a slot: t[rows, padded(R)] = a S, which it may change
  void visit(int64_t slot, int64_t row, int64_t rows, const acc_t* a, acc_t* t) {}

  // sums[rows, ld]: all columns of a block
  void start(int64_t slot, int64_t row, int64_t rows, acc_t* sums, int64_t ld) {}

  // sums[rows, ld] of the `used` columns from col, finished
  void store(int64_t slot, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) {
    if (static_cast<const void*>(sums) == p.out + row * p.N + col && !p.bias) return;
    acc_t bias[kPanel<acc_t>];
    if (p.bias) widen(bias, p.bias + col, used);
    const acc_t* const gain = p.transposed && p.gain ? p.gain + col : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      acc_t* const sum = sums + i * ld;
      if (gain)
        for (int64_t j = 0; j < used; ++j) sum[j] *= gain[j];
      narrow(p.out + (row + i) * p.N + col, sum, p.bias ? bias : nullptr, used);
    }
  }
};

template <typename Op>
void block_product(Op& op, const Rows& rows_of) {
  using scalar_t = typename Op::scalar_t;
  using acc_t = typename Op::acc_t;
  constexpr bool kPairs = Op::kPairs;
  constexpr int64_t kWide = kPanel<acc_t>;
  const LowRank<scalar_t>& p = op.p;
  const int64_t K = op.lanes(), Rp = padded<acc_t>(p.R), E = kPairs ? Rp : p.R;
  const auto options = p.options.dtype(c10::CppTypeToScalarType<acc_t>::value);

  const int64_t slots = rows_of.slots, block = rows_of.block;
  const int64_t all = (p.N + kWide - 1) / kWide * kWide;
  int64_t group = kGroupBytes / (sizeof(acc_t) * std::max<int64_t>(1, K + E)) / kWide * kWide;
  group = std::max(kWide, Op::kStarts ? all : std::min(all, group));
  const int64_t passes = K > kDepth ? (K + kDepth - 1) / kDepth : 1;
  // sums of one panel at a time, unless they are started or come back
  const bool whole = Op::kStarts || passes > 1;

  const int64_t ld = whole ? group : kWide;
  const int64_t wide_size = op.direct() ? 0 : block * p.K;
  const int64_t shrink_size = K * Rp, group_size = (K + E) * group;
  const int64_t slot_size = block * ld + wide_size;
  at::Tensor scratch =
      at::empty({shrink_size + group_size + slots * slot_size + p.M * Rp}, options);
  acc_t* const shrink = scratch.template mutable_data_ptr<acc_t>();
  acc_t* const panels = shrink + shrink_size;
  acc_t* const t_all = panels + group_size;
  acc_t* const blocks = t_all + p.M * Rp;
  const auto width_of = [](int64_t cols) { return cols > kWidth<acc_t> ? kWide : kWidth<acc_t>; };

  for (int64_t col0 = 0; col0 == 0 || col0 < p.N; col0 += group) {
    const int64_t cols = std::min(group, p.N - col0), count = (cols + kWide - 1) / kWide;
    const int64_t shrinks = col0 == 0 ? (p.R + kWide - 1) / kWide : 0;
    const int64_t grain = slots > 1 ? 1 : shrinks + count + 1;
    at::parallel_for(0, shrinks + count, grain, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const bool is_shrink = i < shrinks;
        const int64_t first = is_shrink ? i * kWide : col0 + (i - shrinks) * kWide;
        const int64_t width = width_of((is_shrink ? p.R : p.N) - first);
        if (is_shrink) {
          pack_panel<kPairs>(shrink + first * K, p.shrink, p.transposed, p.K, p.R, first, width);
          continue;
        }
        acc_t* const panel = panels + (first - col0) * (K + E);
        acc_t* const expand = panel + K * width;
        op.pack(panel, first, width);
        pack_panel<false>(expand, p.expand, p.transposed, p.R, p.N, first, width);
        if constexpr (kPairs) {
          twice(expand, p.R * width);
          std::fill(expand + p.R * width, expand + E * width, acc_t(0));
        }
      }
    });

    const auto run_block = [&](int64_t slot, int64_t row, int64_t rows) {
      acc_t* const sums = blocks + slot * slot_size;
      acc_t* const t = t_all + row * Rp;
      const acc_t* const a = op.load(sums + block * ld, row, rows);
      if (col0 == 0) {
        for (int64_t r = 0; r < p.R; r += kWide) {
          const int64_t width = width_of(p.R - r);
          multiply_panel<acc_t, kPairs, false>(t + r, Rp, false, rows, width == kWide,
                                               {a, K, shrink + r * K, width, K});
        }
        op.visit(slot, row, rows, a, t);
        // in the update the sums of t keep 16 bits, twice those of the result
        if constexpr (kPairs) split_pairs(t, rows * Rp);
        op.start(slot, row, rows, sums, ld);
      }
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t k = pass * kDepth;
        const bool last = pass + 1 == passes;
        const int64_t depth = last ? K - k : kDepth;
        for (int64_t c = 0; c < cols; c += kWide) {
          const int64_t width = width_of(p.N - col0 - c);
          const int64_t used = std::min(width, cols - c);
          const acc_t* panel = panels + c * (K + E);
          const bool in_place = Op::kPlainStore && !Op::kStarts && op.in_place() && used == width;
          acc_t* const c_sums = in_place ? reinterpret_cast<acc_t*>(p.out) + row * p.N + col0 + c
                                : whole  ? sums + c
                                         : sums;
          const int64_t ld_sums = in_place ? p.N : ld;
          multiply_panel<acc_t, kPairs, false>(c_sums, ld_sums, Op::kStarts || pass > 0, rows,
                                               width == kWide,
                                               {a + k, K, panel + k * width, width, depth},
                                               {t, Rp, panel + K * width, width, last ? E : 0});
          if (last) op.store(slot, row, rows, col0 + c, used, c_sums, ld_sums);
        }
      }
    };
    at::parallel_for(0, rows_of.slots, 1, [&](int64_t b, int64_t e) {
      for (int64_t slot = b; slot < e; ++slot) {
        const int64_t end = std::min(p.M, (slot + 1) * rows_of.per_slot);
        for (int64_t row = slot * rows_of.per_slot; row < end; row += rows_of.block)
          run_block(slot, row, std::min(rows_of.block, end - row));
      }
    });
  }
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
  return Rows(op.p.M, op.lanes(), sizeof(typename Op::acc_t), op.p.M * op.p.N * op.p.K,
              kHeight<Op::kPairs>);
}

// rows of a share that go by all columns before the next: so few that their pages stay at hand
constexpr int64_t kOuterRun = 64;

// sum[R, padded N] (+)= t[rows, R]ᵀ src[rows, N]: one block's share of a factor's gradient.
// kPairs: t is made of pairs of rows, [(rows + 1) / 2, R] lanes. panel: room for one of src.
template <bool kPairs, typename scalar_t, typename acc_t>
void add_outer(acc_t* sum, bool add, const acc_t* t, int64_t ldt, int64_t R, const scalar_t* src,
               int64_t N, int64_t rows, acc_t* panel) {
  constexpr int64_t kWide = kPanel<acc_t>;
  const int64_t ld = padded<acc_t>(N);
  for (int64_t row = 0; row < rows; row += kOuterRun) {
    const int64_t depth = std::min(kOuterRun, rows - row);
    const acc_t* const left = t + (kPairs ? row / 2 : row) * ldt;
    for (int64_t c = 0; c < N; c += kWide) {
      const int64_t used = std::min(kWide, N - c);
      const int64_t width = used > kWidth<acc_t> ? kWide : kWidth<acc_t>;
      const scalar_t* const from = src + row * N + c;
      Term<acc_t> term{left, ldt, panel, width, kPairs ? (depth + 1) / 2 : depth};
      if constexpr (kPairs) {
        pack_row_pairs(panel, width, from, N, used, depth);
      } else if (std::is_same_v<scalar_t, acc_t> && used == width) {
        term.b = reinterpret_cast<const acc_t*>(from);
        term.ldb = N;
      } else {
        pack_rows(panel, width, from, N, used, depth);
      }
      multiply_panel<acc_t, kPairs, true>(sum + c, ld, add || row > 0, R, width == kWide, term);
    }
  }
}

}  // namespace lorakern
