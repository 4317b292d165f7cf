// out[M, N] += t[M, R] E, with t = a S: the update alone, onto a base product that is in out.
//
// Where a library's base product is faster than block_product's by more than out costs to read and
// write once more, it goes first. The op is block_product's: a and out may not be 16-bit, for out would
// be rounded twice. A gain of out's columns, and the bias that then comes after it, are applied here.

#pragma once

#include <type_traits>

#include "block.h"

namespace lorakern {

template <typename Op>
void add_update(Op& op, const Rows& rows_of) {
  using acc_t = typename Op::acc_t;
  static_assert(std::is_same_v<typename Op::scalar_t, acc_t>);
  constexpr int64_t kWide = kPanel<acc_t>;
  const auto& p = op.p;
  const int64_t K = op.lanes(), Rp = op.t_lanes(), E = op.expand_lanes();
  const int64_t panels = (p.N + kWide - 1) / kWide, block = rows_of.block;
  const int64_t shrink_size = K * Rp, expand_size = panels * kWide * E;
  const int64_t slot_size = block * Rp + kTileRows * kWide;
  at::Tensor scratch = at::empty({shrink_size + expand_size + rows_of.slots * slot_size},
                                 p.options.dtype(c10::CppTypeToScalarType<acc_t>::value));
  acc_t* const shrink = scratch.template mutable_data_ptr<acc_t>();
  acc_t* const expand = shrink + shrink_size;
  acc_t* const slots = expand + expand_size;

  pack_shared(op, shrink, op.shrinks(), panels, rows_of.slots, [&](int64_t i) {
    const int64_t first = i * kWide;
    op.pack_expand(expand + first * E, first, width_of<acc_t>(p.N - first));
  });

  // rows of out that stay in L1 for all columns
  const auto add = [&](int64_t row, int64_t rows, const acc_t* t, acc_t* sums) {
    for (int64_t c = 0; c < p.N; c += kWide) {
      const auto [out, ld, left] = op.place(row, c);
      const int64_t used = std::min(kWide, left), width = width_of<acc_t>(p.N - c);
      const Term<acc_t> update = op.update(t, expand + c * E, c, width);
      const bool fits = used == width;
      multiply_panel<acc_t, false, false>(fits ? out : sums, fits ? ld : kWide, fits, rows,
                                          width == kWide, update);
      for (int64_t i = 0; !fits && i < rows; ++i)
        for (int64_t j = 0; j < used; ++j) out[i * ld + j] += sums[i * kWide + j];
    }
    if (!p.transposed || !p.gain) return;
    for (int64_t i = row; i < row + rows; ++i) {
      acc_t* const out = p.out + i * p.N;
      for (int64_t j = 0; j < p.N; ++j) out[j] = out[j] * p.gain[j] + (p.bias ? p.bias[j] : 0);
    }
  };
  at::parallel_for(0, rows_of.slots, 1, [&](int64_t b, int64_t e) {
    for (int64_t slot = b; slot < e; ++slot) {
      acc_t* const t = slots + slot * slot_size;
      const int64_t end = std::min(p.M, (slot + 1) * rows_of.per_slot);
      for (int64_t row = slot * rows_of.per_slot; row < end; row += block) {
        const int64_t rows = std::min(block, end - row);
        const acc_t* const a = op.load(nullptr, row, rows);
        op.shrink(t, a, shrink, row, rows);
        op.visit(slot, row, rows, a, t);
        for (int64_t i = 0; i < rows; i += kTileRows)
          add(row + i, std::min<int64_t>(kTileRows, rows - i), t + i * Rp, t + block * Rp);
      }
    }
  });
}

}  // namespace lorakern
