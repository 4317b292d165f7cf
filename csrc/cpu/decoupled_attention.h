// Attention of blocks of queries over groups of keys. Keys and values of one head are packed for
// tile.h with all groups side by side, in columns [d, T] for products over channels and in tokens
// [T, d] for products over keys.

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "pack.h"

namespace lorakern {

// queries of a block: their scores and outputs stay in L2
constexpr int64_t kQueries = 4 * kTileRows;
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

  Tasks(int64_t heads, int64_t queries_, int64_t work) : queries(queries_) {
    const int64_t threads = work < kSerialWork ? 1 : at::get_num_threads();
    const int64_t tiles = (queries + kTileRows - 1) / kTileRows;
    slots = std::clamp<int64_t>((threads + heads - 1) / heads, 1, tiles);
    per_slot = (queries + slots - 1) / slots;
    slots = (queries + per_slot - 1) / per_slot;
    block = std::min(per_slot, kQueries);
    count = heads * slots;
    grain = threads > 1 ? 1 : count;
  }

  template <typename Visit>
  void each_block(int64_t task, const Visit& visit) const {
    const int64_t first = task % slots * per_slot, end = std::min(queries, first + per_slot);
    for (int64_t row = first; row < end; row += block) visit(row, std::min(block, end - row));
  }
};

template <typename scalar_t>
struct Group {
  using acc_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  const scalar_t *k, *v, *mask;
  // between the masks of two images: 0 for one mask that serves all
  int64_t mask_step, T;
  double scale;
  // whether dk and dv are made
  bool wanted;
  // its first column among all keys, and its first row among the wanted ones
  int64_t first = 0, sums = 0;

  acc_t weight(int64_t b, int64_t row) const {
    const acc_t c = scale;
    return mask ? c * static_cast<acc_t>(mask[b * mask_step + row]) : c;
  }

  // to 1 unit in the last place; to 20 where the result is rounded to 16 bits
  static Vec exponential(const Vec& x) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) return x.exp();
    return x.exp_u20();
  }

  // visit(i, keep) for each vector of a row: keep(x, y) is x in lanes of the group, y elsewhere
  template <typename Visit>
  void each_vector(const Visit& visit) const {
    const int64_t whole = T / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) visit(i, [](Vec x, Vec) { return x; });
    if (whole == T) return;
    const Vec inside = Vec::arange(acc_t(0), acc_t(1)) < Vec(acc_t(T - whole));
    visit(whole, [inside](Vec x, Vec y) { return Vec::blendv(y, x, inside); });
  }

  // Scores s[T] become weight * p, p = softmax(factor * s); kBackward: dp[T], the gradient of p
  // before the weight, becomes that of s.
  template <bool kBackward>
  void softmax(acc_t* s, acc_t* dp, acc_t factor, acc_t weight) const {
    Vec top(-std::numeric_limits<acc_t>::infinity()), sum(acc_t(0)), dot(acc_t(0));
    each_vector([&](int64_t i, auto keep) {
      top = at::vec::clamp_min(keep(Vec::loadu(s + i), top), top);
    });
    const auto larger = [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); };
    const Vec largest(at::vec::vec_reduce_all<acc_t>(larger, top)), by_factor(factor);
    each_vector([&](int64_t i, auto keep) {
      const Vec x = Vec::loadu(s + i), e = exponential((x - largest) * by_factor);
      keep(e, x).store(s + i);
      sum = sum + keep(e, Vec(acc_t(0)));
      if constexpr (kBackward) dot = dot + keep(e * Vec::loadu(dp + i), Vec(acc_t(0)));
    });
    const auto plus = [](const Vec& a, const Vec& b) { return a + b; };
    const acc_t share = 1 / at::vec::vec_reduce_all<acc_t>(plus, sum);
    const Vec by(weight * share);
    if constexpr (kBackward) {
      const Vec mean(share * at::vec::vec_reduce_all<acc_t>(plus, dot));
      each_vector([&](int64_t i, auto keep) {
        const Vec x = Vec::loadu(s + i), g = Vec::loadu(dp + i), p = x * by;
        keep(p, x).store(s + i);
        keep((g - mean) * p * by_factor, g).store(dp + i);
      });
    } else {
      each_vector([&](int64_t i, auto keep) {
        const Vec x = Vec::loadu(s + i);
        keep(x * by, x).store(s + i);
      });
    }
  }
};

template <typename acc_t>
inline int64_t panel_width(int64_t cols) {
  return cols > kWidth<acc_t> ? kPanel<acc_t> : kWidth<acc_t>;
}

template <typename acc_t>
struct Rows {
  const acc_t* data;
  int64_t ld;
};

// c[rows, padded(cols)] = a[rows, k] b, b packed in panels
template <typename acc_t, bool kPairs>
void product(acc_t* c, int64_t ldc, int64_t rows, Rows<acc_t> a, const acc_t* b, int64_t k,
             int64_t cols) {
  for (int64_t j = 0; j < cols; j += kPanel<acc_t>) {
    const int64_t width = panel_width<acc_t>(cols - j);
    multiply_panel<acc_t, kPairs, false>(c + j, ldc, false, rows, width == kPanel<acc_t>,
                                         {a.data, a.ld, b + j * k, width, k});
  }
}

// c[rows, cols] += a[count, rows]ᵀ b[count, cols], cols in whole vectors
template <typename acc_t>
void add_transposed(acc_t* c, int64_t rows, int64_t cols, Rows<acc_t> a, Rows<acc_t> b,
                    int64_t count) {
  for (int64_t j = 0; j < cols; j += kPanel<acc_t>) {
    multiply_panel<acc_t, false, true>(c + j, cols, true, rows,
                                       panel_width<acc_t>(cols - j) == kPanel<acc_t>,
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
    // Few keys weigh more each than many. They come last in the sum over all: after a large term
    // every small one would be rounded to its grid.
    for (auto& a : groups) {
      a.first = 0;
      for (const auto& b : groups)
        if (b.T > a.T || (b.T == a.T && &b < &a)) a.first += b.T;
    }
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
      const int64_t width = panel_width<acc_t>(T - j);
      pack_transposed(out + j * k, width, gathered + j * k, k, std::min(width, T - j), k);
    }
  }

  // One operand of a head for products over keys.
  void pack_tokens(acc_t* out, Operand operand, int64_t b, int64_t h) const {
    for (int64_t j = 0; j < d; j += kPanel<acc_t>) {
      const int64_t width = panel_width<acc_t>(d - j);
      for (const auto& g : groups)
        pack_rows(out + j * T + g.first * width, width, g.*operand + b * g.T * C + h * d + j, C,
                  std::min(width, d - j), g.T);
    }
  }

  // Rows of x[count, d], C apart, as they can be multiplied: where they are, or widened in `room`
  // [count, dp] with zeros beyond d.
  Rows<acc_t> rows(const scalar_t* x, acc_t* room, int64_t count) const {
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
