// decoupled_attention in register tiles: each query's scores of all groups are one row.

#pragma once

#include "decoupled_attention.h"

namespace lorakern {

// What a thread holds of one head and one block of queries.
template <typename scalar_t, bool kPairs>
class ForwardRows {
 public:
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr int64_t kTall = kTileRows, kMost = kQueries;

  ForwardRows(const Attention<scalar_t>& given, int64_t queries)
      : p(given), scratch(p.d * p.Tp + p.T * (p.dp + p.d) + queries * (p.Tp + p.dp)),
        s(scratch.take(queries * p.Tp)), rows(scratch.take(queries * p.dp)) {}

  void head(int64_t b, int64_t h) {
    p.template pack_columns<kPairs>(keys, gathered, &Group<scalar_t>::k, b, h);
    p.pack_tokens(values, &Group<scalar_t>::v, b, h);
  }

  void block(scalar_t* out, int64_t b, int64_t h, int64_t row, int64_t count) {
    const int64_t at = (b * p.Q + row) * p.C + h * p.d;
    p.template scores<kPairs>(s, p.q + at, rows, count, keys);
    for (int64_t i = 0; i < count; ++i) {
      for (const auto& g : p.groups)
        g.template softmax<false>(s + i * p.Tp + g.first, nullptr, p.factor, g.weight(b, row + i));
    }
    p.weigh(out + at, s, values, rows, count);
  }

 private:
  const Attention<scalar_t>& p;
  Scratch<acc_t> scratch;
  acc_t* const s;
  acc_t* const rows;
  acc_t* const keys = scratch.take(p.d * p.Tp);
  acc_t* const values = scratch.take(p.T * p.dp);
  acc_t* const gathered = scratch.take(p.T * p.d);
};

template <typename scalar_t, bool kPairs>
class BackwardRows {
 public:
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr int64_t kTall = kTileRows, kMost = kQueries;

  BackwardRows(const Attention<scalar_t>& given, int64_t queries, bool need_dq)
      : p(given), need_dq(need_dq), scratch(2 * p.d * p.Tp + p.T * (p.dp + p.d) +
                                            queries * (2 * p.Tp + 3 * p.dp)),
        s(scratch.take(queries * p.Tp)), ds(scratch.take(queries * p.Tp)),
        q_rows(scratch.take(queries * p.dp)), dout_rows(scratch.take(queries * p.dp)),
        dq_rows(scratch.take(queries * p.dp)) {}

  void head(int64_t b, int64_t h) {
    p.template pack_columns<kPairs>(keys, gathered, &Group<scalar_t>::k, b, h);
    p.template pack_columns<kPairs>(values, gathered, &Group<scalar_t>::v, b, h);
    if (need_dq) p.pack_tokens(key_rows, &Group<scalar_t>::k, b, h);
  }

  // dk and dv are added to sums[dk or dv, wanted token, dp]
  void block(const scalar_t* dout, scalar_t* dq, acc_t* sums, int64_t b, int64_t h, int64_t row,
             int64_t count) {
    const int64_t at = (b * p.Q + row) * p.C + h * p.d;
    p.template scores<kPairs>(s, p.q + at, q_rows, count, keys);
    p.template scores<kPairs>(ds, dout + at, dout_rows, count, values);
    for (int64_t i = 0; i < count; ++i) {
      for (const auto& g : p.groups) {
        const int64_t j = i * p.Tp + g.first;
        g.template softmax<true>(s + j, ds + j, p.factor, g.weight(b, row + i));
      }
    }
    if (need_dq) p.weigh(dq + at, ds, key_rows, dq_rows, count);
    if (!p.wanted) return;
    const HeadRows<acc_t> q_of = p.rows(p.q + at, q_rows, count);
    const HeadRows<acc_t> dout_of = p.rows(dout + at, dout_rows, count);
    for (const auto& g : p.groups) {
      if (!g.wanted) continue;
      acc_t* const to = sums + g.sums * p.dp;
      add_transposed(to, g.T, p.dp, {ds + g.first, p.Tp}, q_of, count);
      add_transposed(to + p.wanted * p.dp, g.T, p.dp, {s + g.first, p.Tp}, dout_of, count);
    }
  }

 private:
  const Attention<scalar_t>& p;
  const bool need_dq;
  Scratch<acc_t> scratch;
  acc_t* const s;
  acc_t* const ds;
  acc_t* const q_rows;
  acc_t* const dout_rows;
  acc_t* const dq_rows;
  acc_t* const keys = scratch.take(p.d * p.Tp);
  acc_t* const values = scratch.take(p.d * p.Tp);
  acc_t* const key_rows = scratch.take(p.T * p.dp);
  acc_t* const gathered = scratch.take(p.T * p.d);
};

}  // namespace lorakern
