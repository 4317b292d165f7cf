// Attention of blocks of queries over groups of keys. Keys and values of one head are packed for
// tile.h with all groups side by side, in columns [d, T] for products over channels and in tokens
// [T, d] for products over keys.

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "attention_group.h"
#include "pack.h"

namespace lorakern {

// queries of a block: their scores and outputs stay in L2
constexpr int64_t kQueries = 4 * kTileRows;
// queries of a task, whose gradients of keys and values are one sum: rounding grows with it
constexpr int64_t kLongest = 2048;
// multiply-adds below which a second thread costs more than it brings
constexpr int64_t kSerialWork = 1 << 17;

// Room for a thread's buffers, in lines of the cache.
template <typename acc_t>
struct Scratch {
  static constexpr int64_t kLine = 64 / sizeof(acc_t);
  at::Tensor memory;
  acc_t* next;

  explicit Scratch(int64_t size)
      : memory(at::empty({size + 16 * kLine}, c10::CppTypeToScalarType<acc_t>::value)),
        next(memory.mutable_data_ptr<acc_t>()) {}

  acc_t* take(int64_t size) {
    acc_t* const first = next;
    next += (size + kLine - 1) / kLine * kLine;
    return first;
  }
};

// How the queries are shared: `slots` tasks a head, each a run of neighbouring rows in blocks.
struct Tasks {
  int64_t queries, slots, per_slot, block, count, grain;

  // at least `tall` queries to a task, at most `most` to a block
  Tasks(int64_t heads, int64_t queries_, int64_t work, int64_t tall, int64_t most)
      : queries(queries_) {
    const int64_t threads = work < kSerialWork ? 1 : at::get_num_threads();
    const int64_t tiles = (queries + tall - 1) / tall;
    const int64_t runs = std::max((threads + heads - 1) / heads, queries / kLongest);
    slots = std::clamp<int64_t>(runs, 1, tiles);
    per_slot = ((queries + slots - 1) / slots + tall - 1) / tall * tall;
    slots = (queries + per_slot - 1) / per_slot;
    block = std::min(std::min(queries, per_slot), most);
    count = heads * slots;
    grain = threads > 1 ? 1 : count;
  }

  template <typename Visit>
  void each_block(int64_t task, const Visit& visit) const {
    const int64_t first = task % slots * per_slot, end = std::min(queries, first + per_slot);
    for (int64_t row = first; row < end; row += block) visit(row, std::min(block, end - row));
  }
};

template <typename acc_t>
struct HeadRows {
  const acc_t* data;
  int64_t ld;
};

// c[rows, padded(cols)] = a[rows, k] b, b packed in panels
template <typename acc_t, bool kPairs>
void product(acc_t* c, int64_t ldc, int64_t rows, HeadRows<acc_t> a, const acc_t* b, int64_t k,
             int64_t cols) {
  for (int64_t j = 0; j < cols; j += kPanel<acc_t>) {
    const int64_t width = width_of<acc_t>(cols - j);
    multiply_panel<acc_t, kPairs, false>(c + j, ldc, false, rows, width == kPanel<acc_t>,
                                         {a.data, a.ld, b + j * k, width, k});
  }
}

// c[rows, cols] += a[count, rows]ᵀ b[count, cols], cols in whole vectors
template <typename acc_t>
void add_transposed(acc_t* c, int64_t rows, int64_t cols, HeadRows<acc_t> a, HeadRows<acc_t> b,
                    int64_t count) {
  for (int64_t j = 0; j < cols; j += kPanel<acc_t>) {
    multiply_panel<acc_t, false, true>(c + j, cols, true, rows,
                                       width_of<acc_t>(cols - j) == kPanel<acc_t>,
                                       {a.data, a.ld, b.data + j, b.ld, count});
  }
}

template <typename scalar_t>
struct Attention {
  using acc_t = at::opmath_type<scalar_t>;
  using Operand = const scalar_t* Group<scalar_t>::*;

  int64_t B, Q, H, C, d, dp, T = 0, Tp = 0, wanted = 0;
  const scalar_t* q;
  acc_t factor;
  std::vector<Group<scalar_t>> groups;

  Attention(int64_t images, int64_t queries, int64_t heads, int64_t channels, const scalar_t* q_)
      : B(images), Q(queries), H(heads), C(channels), d(channels / heads), dp(padded<acc_t>(d)),
        q(q_), factor(1 / std::sqrt(static_cast<acc_t>(d))) {}

  void add(Group<scalar_t> g) {
    g.sums = wanted;
    T += g.T;
    Tp = padded<acc_t>(T);
    wanted += g.wanted ? g.T : 0;
    groups.push_back(g);
    place(1);
  }

  // Puts the groups side by side, each in a multiple of `step` places, and returns the end of the
  // last. Few keys weigh more each than many. They come last in the sum over all: after a large
  // term every small one would be rounded to its grid.
  int64_t place(int64_t step) {
    int64_t end = 0;
    for (auto& a : groups) {
      const auto room = [step](const auto& g) { return (g.T + step - 1) / step * step; };
      a.first = 0;
      for (const auto& b : groups)
        if (b.T > a.T || (b.T == a.T && &b < &a)) a.first += room(b);
      end = std::max(end, a.first + room(a));
    }
    return end;
  }

  int64_t work() const { return 2 * B * Q * C * T; }

  // One operand of a head for products over channels. kPairs: two channels a lane.
  template <bool kPairs>
  void pack_columns(acc_t* out, acc_t* gathered, Operand operand, int64_t b, int64_t h) const {
    const int64_t k = kPairs ? d / 2 : d;
    for (const auto& g : groups) {
      acc_t* row = gathered + g.first * k;
      const scalar_t* from = g.*operand + b * g.T * C + h * d;
      for (int64_t t = 0; t < g.T; ++t, row += k, from += C) {
        if constexpr (kPairs) {
          std::memcpy(row, from, d * sizeof(scalar_t));
        } else {
          widen(row, from, d);
        }
      }
    }
    for (int64_t j = 0; j < T; j += kPanel<acc_t>) {
      const int64_t width = width_of<acc_t>(T - j);
      pack_transposed(out + j * k, width, gathered + j * k, k, std::min(width, T - j), k);
    }
  }

  // One operand of a head for products over keys.
  void pack_tokens(acc_t* out, Operand operand, int64_t b, int64_t h) const {
    for (int64_t j = 0; j < d; j += kPanel<acc_t>) {
      const int64_t width = width_of<acc_t>(d - j);
      for (const auto& g : groups)
        pack_rows(out + j * T + g.first * width, width, g.*operand + b * g.T * C + h * d + j, C,
                  std::min(width, d - j), g.T);
    }
  }

  // Rows of x[count, d], C apart, as they can be multiplied: where they are, or widened in `room`
  // [count, dp] with zeros beyond d.
  HeadRows<acc_t> rows(const scalar_t* x, acc_t* room, int64_t count) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (d == dp) return {x, C};
    }
    pack_rows(room, dp, x, C, d, count);
    return {room, dp};
  }

  // s[count, Tp] = x columns, for rows of x that are C apart
  template <bool kPairs>
  void scores(acc_t* s, const scalar_t* x, acc_t* room, int64_t count, const acc_t* columns) const {
    if constexpr (kPairs) {
      const auto* pairs = reinterpret_cast<const acc_t*>(x);
      product<acc_t, true>(s, Tp, count, {pairs, C / 2}, columns, d / 2, T);
    } else {
      product<acc_t, false>(s, Tp, count, rows(x, room, count), columns, d, T);
    }
  }

  // out[count, d], C apart, = s[count, Tp] values of all tokens, rounded once
  void weigh(scalar_t* out, const acc_t* s, const acc_t* tokens, acc_t* room, int64_t count) const {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      if (d == dp) return product<acc_t, false>(out, C, count, {s, Tp}, tokens, T, d);
    }
    product<acc_t, false>(room, dp, count, {s, Tp}, tokens, T, d);
    for (int64_t i = 0; i < count; ++i)
      narrow<scalar_t, acc_t>(out + i * C, room + i * dp, nullptr, d);
  }
};

}  // namespace lorakern
