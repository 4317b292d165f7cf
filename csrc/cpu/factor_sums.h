// The gradients of the factors of one layer or of several that share x, summed block by block:
// ddown[R, I] = (scale · dy up)ᵀ x and dup[O, R] = scale · dyᵀ h. A slot sums the blocks of its rows,
// and the slots are added in order, so that the sums are the same in every run.

#pragma once

#include <vector>

#include "block.h"

namespace lorakern {

// most rows of a share that go by all columns before the next: so few that their pages stay at hand
constexpr int64_t kOuterRun = 64;

// sum[R, padded N] (+)= t[rows, R]ᵀ src[rows, N]: one block's share of a factor's gradient.
// kPairs: t is made of pairs of rows, [(rows + 1) / 2, R] lanes. panel: room for one of src. gain: of
// src's columns, which pairs do not have here; may be null.
template <bool kPairs, typename scalar_t, typename acc_t>
void add_outer(acc_t* sum, bool add, const acc_t* t, int64_t ldt, int64_t R, const scalar_t* src,
               int64_t N, int64_t rows, acc_t* panel, const acc_t* gain = nullptr) {
  constexpr int64_t kWide = kPanel<acc_t>;
  const int64_t ld = padded<acc_t>(N);
  // runs of nearly equal length, in whole pairs
  const int64_t runs = (rows + kOuterRun - 1) / kOuterRun;
  const int64_t length = (rows + 2 * runs - 1) / (2 * runs) * 2;
  for (int64_t row = 0; row < rows; row += length) {
    const int64_t depth = std::min(length, rows - row);
    const acc_t* const left = t + (kPairs ? row / 2 : row) * ldt;
    for (int64_t c = 0; c < N; c += kWide) {
      const int64_t used = std::min(kWide, N - c);
      const int64_t width = used > kWidth<acc_t> ? kWide : kWidth<acc_t>;
      const scalar_t* const from = src + row * N + c;
      Term<acc_t> term{left, ldt, panel, width, kPairs ? (depth + 1) / 2 : depth};
      if constexpr (kPairs) {
        pack_row_pairs(panel, width, from, N, used, depth);
      } else if (std::is_same_v<scalar_t, acc_t> && used == width && !gain) {
        term.b = reinterpret_cast<const acc_t*>(from);
        term.ldb = N;
      } else {
        pack_rows(panel, width, from, N, used, depth);
        for (int64_t i = 0; gain && i < depth; ++i)
          for (int64_t j = 0; j < used; ++j) panel[i * width + j] *= gain[c + j];
      }
      multiply_panel<acc_t, kPairs, true>(sum + c, ld, add || row > 0, R, width == kWide, term);
    }
  }
}

// One layer's share: its columns of h, and where its gradients go; null where none is wanted.
template <typename scalar_t>
struct Factors {
  int64_t O, R, first;
  double scale;
  const scalar_t* dy;
  scalar_t *ddown, *dup;
  // [O] on dup; may be null
  const at::opmath_type<scalar_t>* gain = nullptr;
};

template <typename scalar_t, bool kPairs>
struct FactorSums {
  using acc_t = at::opmath_type<scalar_t>;
  std::vector<Factors<scalar_t>> layers;
  const scalar_t *x, *h;
  // R: of all layers, the columns of h
  int64_t I, R;
  Rows rows_of;
  bool any_ddown, any_dup;
  at::Tensor scratch;
  acc_t* sums;

  FactorSums(std::vector<Factors<scalar_t>> layers_, const scalar_t* x, const scalar_t* h,
             int64_t I, int64_t R, const Rows& rows_of, const at::TensorOptions& options)
      : layers(std::move(layers_)), x(x), h(h), I(I), R(R), rows_of(rows_of) {
    any_ddown = any_dup = false;
    for (const auto& layer : layers) {
      any_ddown = any_ddown || layer.ddown;
      any_dup = any_dup || layer.dup;
    }
    scratch = at::empty({rows_of.slots * slot_size()},
                        options.dtype(c10::CppTypeToScalarType<acc_t>::value));
    sums = scratch.mutable_data_ptr<acc_t>();
  }

  int64_t ddown_size() const { return any_ddown ? R * padded<acc_t>(I) : 0; }
  int64_t dup_size(const Factors<scalar_t>& layer) const {
    return layer.dup ? layer.R * padded<acc_t>(layer.O) : 0;
  }
  int64_t factor_size() const { return rows_of.block * R; }
  int64_t slot_size() const {
    int64_t size = ddown_size() + rows_of.block * kPanel<acc_t> + 2 * factor_size();
    for (const auto& layer : layers) size += dup_size(layer);
    return size;
  }

  // One block: t[count, ldt] is scale · dy up of all layers, rows_of_dy(j) the block's rows of the
  // j-th layer's dy, in acc_t; it is not asked for pairs.
  template <typename RowsOfDy>
  void add(int64_t slot, int64_t row, int64_t count, const acc_t* t, int64_t ldt,
           const RowsOfDy& rows_of_dy) const {
    const bool more = row > slot * rows_of.per_slot;
    acc_t* const slot_sums = sums + slot * slot_size();
    acc_t* const panel = slot_sums + slot_size() - rows_of.block * kPanel<acc_t>;
    acc_t* const factor = panel - 2 * factor_size();
    if (any_ddown) {
      if constexpr (kPairs) {
        auto* rounded = reinterpret_cast<scalar_t*>(factor + factor_size());
        for (int64_t i = 0; i < count; ++i)
          narrow<scalar_t, acc_t>(rounded + i * R, t + i * ldt, nullptr, R);
        pack_row_pairs(factor, R, rounded, R, R, count);
        add_outer<true>(slot_sums, more, factor, R, R, x + row * I, I, count, panel);
      } else {
        add_outer<false>(slot_sums, more, t, ldt, R, x + row * I, I, count, panel);
      }
    }
    if (!any_dup) return;
    if constexpr (kPairs) {
      pack_row_pairs(factor, R, h + row * R, R, R, count);
    } else {
      widen(factor, h + row * R, count * R);
    }
    acc_t* dup_sums = slot_sums + ddown_size();
    for (size_t j = 0; j < layers.size(); ++j) {
      const auto& [O, rank, first, scale, dy, ddown, dup, gain] = layers[j];
      if (!dup) continue;
      if constexpr (kPairs) {
        add_outer<true>(dup_sums, more, factor + first, R, rank, dy + row * O, O, count, panel);
      } else {
        add_outer<false>(dup_sums, more, factor + first, R, rank, rows_of_dy(j), O, count, panel,
                         gain);
      }
      dup_sums += dup_size(layers[j]);
    }
  }

  // the gradients themselves, once every block was added
  void write() const {
    int64_t used = ddown_size();
    for (const auto& layer : layers) used += dup_size(layer);
    for (int64_t slot = 1; slot < rows_of.slots; ++slot)
      at::vec::map2([](auto a, auto b) { return a + b; }, sums, sums, sums + slot * slot_size(), used);
    acc_t* dup_sums = sums + ddown_size();
    for (const auto& layer : layers) {
      const auto& [O, rank, first, scale, dy, ddown, dup, gain] = layer;
      for (int64_t r = 0; ddown && r < rank; ++r)
        narrow<scalar_t, acc_t>(ddown + r * I, sums + (first + r) * padded<acc_t>(I), nullptr, I);
      for (int64_t r = 0; kPairs && dup && gain && r < rank; ++r) {
        acc_t* const row = dup_sums + r * padded<acc_t>(O);
        at::vec::map2([](auto a, auto b) { return a * b; }, row, row, gain, O);
      }
      if (dup) write_transposed(dup, dup_sums, O, rank, static_cast<acc_t>(scale));
      dup_sums += dup_size(layer);
    }
  }

  // dup[O, rank] = scale · from[rank, padded O]ᵀ
  static void write_transposed(scalar_t* dup, const acc_t* from, int64_t O, int64_t rank,
                               acc_t scale) {
    constexpr int64_t kSome = 64;
    std::vector<acc_t> some(kSome * rank);
    for (int64_t o = 0; o < O; o += kSome) {
      const int64_t count = std::min(kSome, O - o);
      pack_transposed(some.data(), rank, from + o, padded<acc_t>(O), rank, count);
      for (int64_t i = 0; i < count * rank; ++i) some[i] *= scale;
      narrow<scalar_t, acc_t>(dup + o * rank, some.data(), nullptr, count * rank);
    }
  }
};

}  // namespace lorakern
