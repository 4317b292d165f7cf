// out[M, N] = a[M, K] W + t[M, R] E (+ bias), with t = a S: a product and its update.
//
// Forward of lora_linear is a = x, W = weightᵀ, S = downᵀ, E = upᵀ; the gradient of x is a = dy,
// W = weight, S = up, E = down. Rows go in blocks that stay in cache: t, both products and the sum
// of a block happen there, in one accumulator, and out is written once. Nothing of size M·N or M·K
// is made. W is packed once a call, in groups of columns: for all threads, of at most kGroupBytes,
// or by each thread for itself.
//
// An op says what is its own in a class derived from Block: how W is packed (hada adds ΔW), what a
// sum starts from (kron), what is done with t and with a finished sum (gain, gradients of factors),
// and that a and K, or out and N, are several side by side (layers that share an input).

#pragma once

#include "block.h"

namespace lorakern {

// Whether threads share columns, not rows: where W's panels are more than a core keeps, or rows so
// few that it keeps them all. Then a panel is packed by the thread that multiplies it, for all rows,
// and does not go through memory. Not where rows of out are long beside those of a: writing them is
// what takes the time, and goes best a row after another.
template <typename Op>
bool by_columns(const Op& op) {
  if (!Op::kPlainStore || Op::kStarts) return false;
  const int64_t row = sizeof(typename Op::acc_t) * op.lanes();
  const bool long_rows = op.p.N > 4 * op.p.K;
  return (op.p.N * row > kOwnBytes && !long_rows) || op.p.M * row <= kFewBytes;
}

// Room for sums; where they are few it is the stack, for a small layer waits for an allocation.
template <typename acc_t>
struct Room {
  static constexpr int64_t kFew = 2048;
  alignas(64) acc_t few[kFew];
  at::Tensor many;
  acc_t* data = few;

  Room(int64_t size, const at::TensorOptions& options) {
    if (size <= kFew) return;
    many = at::empty({size}, options);
    data = many.template mutable_data_ptr<acc_t>();
  }
};

template <typename Op>
void block_product(Op& op, const Rows& rows_of) {
  using scalar_t = typename Op::scalar_t;
  using acc_t = typename Op::acc_t;
  constexpr bool kPairs = Op::kPairs;
  constexpr int64_t kWide = kPanel<acc_t>;
  const LowRank<scalar_t>& p = op.p;
  const int64_t K = op.lanes(), Rp = op.t_lanes(), E = op.expand_lanes();
  const auto options = p.options.dtype(c10::CppTypeToScalarType<acc_t>::value);

  const int64_t slots = rows_of.slots, block = rows_of.block;
  const int64_t all = (p.N + kWide - 1) / kWide * kWide;
  int64_t group = kGroupBytes / (sizeof(acc_t) * std::max<int64_t>(1, K + E)) / kWide * kWide;
  group = std::max(kWide, Op::kStarts ? all : std::min(all, group));
  const int64_t passes = op.passes();
  // sums of one panel at a time, unless they are started or come back
  const bool by_panel = op.by_panel();
  const bool whole = Op::kStarts || (passes > 1 && !by_panel);
  // sums that are started where out is
  const bool in_out = Op::kStarts && Op::kPlainStore && op.in_place() && p.N % kWide == 0;

  const bool columns = by_columns(op);

  const int64_t ld = in_out ? p.N : whole ? group : kWide;
  const int64_t wide_size = op.direct() ? 0 : block * p.K;
  const int64_t shrink_size = K * Rp, group_size = columns ? 0 : (K + E) * group;
  const int64_t sums_size = columns || in_out ? 0 : block * ld;
  const int64_t slot_size = sums_size + wide_size;
  Room<acc_t> scratch(shrink_size + group_size + slots * slot_size + p.M * Rp, options);
  acc_t* const shrink = scratch.data;
  acc_t* const panels = shrink + shrink_size;
  acc_t* const t_all = panels + group_size;
  acc_t* const blocks = t_all + p.M * Rp;

  const auto pack = [&](int64_t first, acc_t* panel) {
    const int64_t width = width_of<acc_t>(p.N - first);
    op.pack(panel, first, width);
    op.pack_expand(panel + K * width, first, width);
  };
  const auto start = [&](int64_t slot, int64_t row, int64_t rows, const acc_t* a, acc_t* sums) {
    acc_t* const t = t_all + row * Rp;
    op.shrink(t, a, shrink, row, rows);
    op.visit(slot, row, rows, a, t);
    // in the update the sums of t keep 16 bits, twice those of the result
    if constexpr (kPairs) split_pairs(t, rows * Rp);
    op.start(slot, row, rows, sums, ld);
  };
  // the sums of rows[row, row + rows] and a panel's columns, of which the last pass stores `used`
  const auto multiply = [&](int64_t pass, int64_t slot, int64_t row, int64_t rows, const acc_t* a,
                            int64_t first, int64_t used, const acc_t* panel, acc_t* sums,
                            int64_t ld) {
    const int64_t width = width_of<acc_t>(p.N - first);
    const bool last = pass + 1 == passes;
    if (Op::kPlainStore && !Op::kStarts && op.in_place() && used == width) {
      sums = reinterpret_cast<acc_t*>(p.out) + row * p.N + first;
      ld = p.N;
    }
    const Lanes<acc_t> k = op.pass(pass, a, row, rows);
    op.multiply(
        sums, ld, Op::kStarts || pass > 0, rows, width == kWide,
        {k.a, k.lda, panel + k.from * width, width, k.depth},
        last ? op.update(t_all + row * Rp, panel + K * width, first, width) : Term<acc_t>{});
    if (last) op.store(slot, row, rows, first, used, sums, ld);
  };
  const auto each_block = [&](int64_t slot, const auto& visit) {
    const int64_t end = std::min(p.M, (slot + 1) * rows_of.per_slot);
    for (int64_t row = slot * rows_of.per_slot; row < end; row += block)
      visit(row, std::min(block, end - row));
  };

  if (columns) {
    const auto each = [&](int64_t n, const auto& visit) {
      at::parallel_for(0, n, slots > 1 ? 1 : n + 1, visit);
    };
    each(op.shrinks(), [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) op.pack_shrink(shrink, i);
    });
    each(slots, [&](int64_t b, int64_t e) {
      for (int64_t slot = b; slot < e; ++slot)
        each_block(slot, [&](int64_t row, int64_t rows) {
          start(slot, row, rows, op.load(blocks + slot * slot_size, row, rows), nullptr);
        });
    });
    const int64_t panel_size = (K + E) * kWide, fit = std::min(p.M, rows_of.fit);
    const int64_t most = std::max<int64_t>(1, kOwnBytes / (sizeof(acc_t) * panel_size));
    each(all / kWide, [&](int64_t b, int64_t e) {
      const int64_t own = std::min(most, e - b);
      Room<acc_t> room(own * panel_size + fit * kWide + (op.direct() ? 0 : fit * p.K), options);
      acc_t* const panels = room.data;
      acc_t* const sums = panels + own * panel_size;
      for (int64_t from = b; from < e; from += own) {
        const int64_t count = std::min(own, e - from);
        for (int64_t i = 0; i < count; ++i) pack((from + i) * kWide, panels + i * panel_size);
        for (int64_t row = 0; row < p.M; row += fit) {
          const int64_t rows = std::min(fit, p.M - row);
          const acc_t* const a = op.load(sums + fit * kWide, row, rows);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t first = (from + i) * kWide, used = std::min(kWide, p.N - first);
            for (int64_t pass = 0; pass < passes; ++pass)
              multiply(pass, 0, row, rows, a, first, used, panels + i * panel_size, sums, kWide);
          }
        }
      }
    });
    return;
  }

  for (int64_t col0 = 0; col0 == 0 || col0 < p.N; col0 += group) {
    const int64_t cols = std::min(group, p.N - col0), count = (cols + kWide - 1) / kWide;
    const int64_t shrinks = col0 == 0 ? op.shrinks() : 0;
    pack_shared(op, shrink, shrinks, count, slots, [&](int64_t i) {
      pack(col0 + i * kWide, panels + i * kWide * (K + E));
    });
    at::parallel_for(0, slots, 1, [&](int64_t b, int64_t e) {
      for (int64_t slot = b; slot < e; ++slot)
        each_block(slot, [&](int64_t row, int64_t rows) {
          acc_t* const room = blocks + slot * slot_size;
          const acc_t* const a = op.load(room + sums_size, row, rows);
          acc_t* const sums = in_out ? reinterpret_cast<acc_t*>(p.out) + row * p.N : room;
          if (col0 == 0) start(slot, row, rows, a, sums);
          const int64_t inner = by_panel ? passes : 1;
          for (int64_t outer = 0; outer < passes; outer += inner)
            for (int64_t c = 0; c < cols; c += kWide)
              for (int64_t pass = outer; pass < outer + inner; ++pass)
                multiply(pass, slot, row, rows, a, col0 + c, std::min(kWide, cols - c),
                         panels + c * (K + E), whole ? sums + c : sums, ld);
        });
    });
  }
}

}  // namespace lorakern
