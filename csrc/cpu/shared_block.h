// The products of layers that share an input, as one block_product.
//
// Forward: the outputs stand side by side, each from a whole panel on, so that one block of rows of x
// meets every weight while it is in cache. Backward: the dys stand side by side, and a pass over K is
// over the rows of one of them, so that all layers add to one sum of dx. t has the columns of every
// layer's h side by side, and E is the downs on top of each other.

#pragma once

#include <vector>

#include "block_product.h"
#include "factor_sums.h"

namespace lorakern {

// One layer: where it stands, and its operands; y in forward, dy in backward.
template <typename scalar_t>
struct SharedLayer {
  int64_t O, R;
  // its first column of all outputs, or lane of all dys; its first column of t
  int64_t at, first;
  double scale;
  const scalar_t *weight, *up, *bias, *dy;
  scalar_t* y;
};

template <typename scalar_t>
using SharedLayersOf = std::vector<SharedLayer<scalar_t>>;

template <typename scalar_t, bool kPairs>
struct SharedForward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr bool kPlainStore = false;
  const SharedLayersOf<scalar_t>& layers;
  scalar_t* h;
  // from a row of h to the next
  int64_t ldh;

  const SharedLayer<scalar_t>& layer_of(int64_t col) const {
    size_t j = layers.size() - 1;
    while (layers[j].at > col) --j;
    return layers[j];
  }

  Place<scalar_t> place(int64_t row, int64_t col) const {
    const auto& l = layer_of(col);
    return {l.y + row * l.O + col - l.at, l.O, l.O - (col - l.at)};
  }

  void pack(acc_t* panel, int64_t first, int64_t width) const {
    const auto& l = layer_of(first);
    pack_panel<kPairs>(panel, l.weight, true, this->p.K, l.O, first - l.at, width);
  }
  void pack_expand(acc_t* panel, int64_t first, int64_t width) const {
    const auto& l = layer_of(first);
    pack_update<kPairs>(panel, l.up, true, l.R, l.O, first - l.at, width);
  }
  Term<acc_t> update(const acc_t* t, const acc_t* panel, int64_t first, int64_t width) const {
    const auto& l = layer_of(first);
    return {t + l.first, this->t_lanes(), panel, width, l.R};
  }

  void visit(int64_t, int64_t row, int64_t rows, const acc_t*, acc_t* t) const {
    for (int64_t i = 0; i < rows; ++i, t += this->t_lanes()) {
      narrow<scalar_t, acc_t>(h + (row + i) * ldh, t, nullptr, this->p.R);
      for (const auto& l : layers)
        for (int64_t r = 0; r < l.R; ++r) t[l.first + r] *= static_cast<acc_t>(l.scale);
    }
  }

  void store(int64_t, int64_t row, int64_t rows, int64_t col, int64_t used, acc_t* sums,
             int64_t ld) const {
    const auto& l = layer_of(col);
    const auto [out, ldo, left] = place(row, col);
    used = std::min(used, left);
    acc_t bias[kPanel<acc_t>];
    if (l.bias) widen(bias, l.bias + col - l.at, used);
    for (int64_t i = 0; i < rows; ++i)
      narrow(out + i * ldo, sums + i * ld, l.bias ? bias : nullptr, used);
  }
};

template <typename scalar_t, bool kPairs>
struct SharedBackward : Block<scalar_t, kPairs> {
  using acc_t = at::opmath_type<scalar_t>;
  const SharedLayersOf<scalar_t>& layers;
  FactorSums<scalar_t, kPairs> factors;
  // layer, and lane of its rows
  std::vector<std::pair<size_t, int64_t>> all_passes;

  static int64_t lanes_of(const SharedLayer<scalar_t>& l) { return kPairs ? l.O / 2 : l.O; }

  // the rows of one layer's dy, in lanes
  const acc_t* rows_of_dy(const SharedLayer<scalar_t>& l, const acc_t* a, int64_t row,
                          int64_t rows) const {
    if (!this->direct()) return a + rows * l.at;
    return reinterpret_cast<const acc_t*>(l.dy) + row * lanes_of(l);
  }

  const acc_t* load(acc_t* room, int64_t row, int64_t rows) const {
    if (this->direct()) return nullptr;
    for (const auto& l : layers) widen(room + rows * l.at, l.dy + row * l.O, rows * l.O);
    return room;
  }

  void pack(acc_t* panel, int64_t first, int64_t width) const {
    for (const auto& l : layers)
      pack_panel<kPairs>(panel + l.at * width, l.weight, false, l.O, this->p.N, first, width);
  }

  // The columns that fill up a layer's last panel lie where the next one writes.
  int64_t t_lanes() const {
    int64_t most = padded<acc_t>(this->p.R);
    for (const auto& l : layers) most = std::max(most, l.first + padded<acc_t>(l.R));
    return this->p.R ? most : 0;
  }
  int64_t shrinks() const { return this->p.R ? layers.size() : 0; }
  void pack_shrink(acc_t* shrink, int64_t i) const {
    const auto& l = layers[i];
    for (int64_t r = 0; r < l.R; r += kPanel<acc_t>)
      pack_panel<kPairs>(shrink + l.at * t_lanes() + r * lanes_of(l), l.up, false, l.O, l.R, r,
                         width_of<acc_t>(l.R - r));
  }
  void shrink(acc_t* t, const acc_t* a, const acc_t* shrink, int64_t row, int64_t rows) const {
    const int64_t ld = t_lanes();
    for (size_t j = 0; this->p.R && j < layers.size(); ++j) {
      const auto& l = layers[j];
      const int64_t k = lanes_of(l);
      for (int64_t r = 0; r < l.R; r += kPanel<acc_t>) {
        const int64_t width = width_of<acc_t>(l.R - r);
        multiply_panel<acc_t, kPairs, false>(
            t + l.first + r, ld, false, rows, width == kPanel<acc_t>,
            {rows_of_dy(l, a, row, rows), k, shrink + l.at * ld + r * k, width, k});
      }
    }
  }

  Term<acc_t> update(const acc_t* t, const acc_t* panel, int64_t, int64_t width) const {
    return {t, t_lanes(), panel, width, this->expand_lanes()};
  }

  int64_t passes() const { return all_passes.size(); }
  Lanes<acc_t> pass(int64_t i, const acc_t* a, int64_t row, int64_t rows) const {
    const auto [j, from] = all_passes[i];
    const auto& l = layers[j];
    return {l.at + from, std::min(kDepth, lanes_of(l) - from),
            rows_of_dy(l, a, row, rows) + from, lanes_of(l)};
  }

  void visit(int64_t slot, int64_t row, int64_t rows, const acc_t* a, acc_t* t) const {
    const int64_t ld = t_lanes();
    for (int64_t i = 0; this->p.R && i < rows; ++i)
      for (const auto& l : layers)
        for (int64_t r = 0; r < l.R; ++r) t[i * ld + l.first + r] *= static_cast<acc_t>(l.scale);
    factors.add(slot, row, rows, t, ld,
                [&](size_t j) { return rows_of_dy(layers[j], a, row, rows); });
  }
};

}  // namespace lorakern
