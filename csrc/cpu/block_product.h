// out[M, N] = a[M, K] W + t[M, R] E (+ bias), with t = a S: a product and its update.
//
// Forward of lora_linear is a = x, W = weightᵀ, S = downᵀ, E = upᵀ; the gradient of x is a = dy,
// W = weight, S = up, E = down. Rows go in blocks that stay in cache: t, both products and the sum
// of a block happen there, in one accumulator, and out is written once. Nothing of size M·N or M·K
// is made. W is packed once a call, in groups of columns of at most kGroupBytes.
//
// An op says what is its own in a class derived from Block: how W is packed (hada adds ΔW), what a
// sum starts from (kron), what is done with t and with a finished sum (gain, gradients of factors),
// and that a and K, or out and N, are several side by side (layers that share an input).

#pragma once

#include "block.h"

namespace lorakern {

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

  for (int64_t col0 = 0; col0 == 0 || col0 < p.N; col0 += group) {
    const int64_t cols = std::min(group, p.N - col0), count = (cols + kWide - 1) / kWide;
    const int64_t shrinks = col0 == 0 ? op.shrinks() : 0;
    const int64_t grain = slots > 1 ? 1 : shrinks + count + 1;
    at::parallel_for(0, shrinks + count, grain, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        if (i < shrinks) {
          op.pack_shrink(shrink, i);
          continue;
        }
        const int64_t first = col0 + (i - shrinks) * kWide, width = width_of<acc_t>(p.N - first);
        acc_t* const panel = panels + (first - col0) * (K + E);
        op.pack(panel, first, width);
        op.pack_expand(panel + K * width, first, width);
      }
    });

    const auto run_block = [&](int64_t slot, int64_t row, int64_t rows) {
      acc_t* const sums = blocks + slot * slot_size;
      acc_t* const t = t_all + row * Rp;
      const acc_t* const a = op.load(sums + block * ld, row, rows);
      if (col0 == 0) {
        op.shrink(t, a, shrink, row, rows);
        op.visit(slot, row, rows, a, t);
        // in the update the sums of t keep 16 bits, twice those of the result
        if constexpr (kPairs) split_pairs(t, rows * Rp);
        op.start(slot, row, rows, sums, ld);
      }
      for (int64_t pass = 0; pass < passes; ++pass) {
        const bool last = pass + 1 == passes;
        const Lanes<acc_t> k = op.pass(pass, a, row, rows);
        for (int64_t c = 0; c < cols; c += kWide) {
          const int64_t first = col0 + c, width = width_of<acc_t>(p.N - first);
          const int64_t used = std::min(width, cols - c);
          const acc_t* panel = panels + c * (K + E);
          const bool in_place = Op::kPlainStore && !Op::kStarts && op.in_place() && used == width;
          acc_t* const c_sums = in_place ? reinterpret_cast<acc_t*>(p.out) + row * p.N + first
                                : whole  ? sums + c
                                         : sums;
          const int64_t ld_sums = in_place ? p.N : ld;
          multiply_panel<acc_t, kPairs, false>(
              c_sums, ld_sums, Op::kStarts || pass > 0, rows, width == kWide,
              {k.a, k.lda, panel + k.from * width, width, k.depth},
              last ? op.update(t, panel + K * width, first, width) : Term<acc_t>{});
          if (last) op.store(slot, row, rows, first, used, c_sums, ld_sums);
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

}  // namespace lorakern
