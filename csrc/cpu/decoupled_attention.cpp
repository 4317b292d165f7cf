// decoupled_attention on CPU. Spec: lorakern/ops/decoupled_attention/reference.py
//
// The plain-torch spec makes four B x H x Q x T tensors a group and adds up outputs that were
// rounded. Here the keys of all groups stand side by side: a block of queries meets them in one
// product, gets one softmax a group while it is in cache, and meets the values in one product,
// whose sum is rounded once. q is read and out is written once.

#include "decoupled_attention.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../attention_groups.h"
#include "attention_columns.h"

namespace lorakern {
namespace {

// What a thread holds of one head and one block of queries.
template <typename scalar, bool kPairs>
class ForwardRows {
 public:
  using scalar_t = scalar;
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

template <typename Forward, typename scalar_t>
void forward(const Attention<scalar_t>& p, scalar_t* out) {
  const Tasks tasks(p.B * p.H, p.Q, p.work(), Forward::kTall, Forward::kMost);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    Forward own(p, tasks.block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks.slots, b = head / p.H, h = head % p.H;
      own.head(b, h);
      tasks.each_block(task,
                       [&](int64_t row, int64_t count) { own.block(out, b, h, row, count); });
    }
  });
}

// dk and dv: [rows of the wanted groups, C], or null
template <typename scalar_t, bool kPairs>
void backward(const Attention<scalar_t>& p, const scalar_t* dout, scalar_t* dq, scalar_t* dk,
              scalar_t* dv) {
  using acc_t = at::opmath_type<scalar_t>;
  const Tasks tasks(p.B * p.H, p.Q, 3 * p.work(), kTileRows, kQueries);
  const int64_t share = p.wanted * p.dp;
  // [task, dk or dv, wanted token, dp]
  Scratch<acc_t> shares(2 * share * tasks.count);
  acc_t* const sums = shares.take(2 * share * tasks.count);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    Scratch<acc_t> scratch(2 * p.d * p.Tp + p.T * (p.dp + p.d) +
                           tasks.block * (2 * p.Tp + 3 * p.dp));
    acc_t* const keys = scratch.take(p.d * p.Tp);
    acc_t* const values = scratch.take(p.d * p.Tp);
    acc_t* const key_rows = scratch.take(p.T * p.dp);
    acc_t* const gathered = scratch.take(p.T * p.d);
    acc_t* const s = scratch.take(tasks.block * p.Tp);
    acc_t* const ds = scratch.take(tasks.block * p.Tp);
    acc_t* const q_rows = scratch.take(tasks.block * p.dp);
    acc_t* const dout_rows = scratch.take(tasks.block * p.dp);
    acc_t* const dq_rows = scratch.take(tasks.block * p.dp);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks.slots, b = head / p.H, h = head % p.H;
      p.template pack_columns<kPairs>(keys, gathered, &Group<scalar_t>::k, b, h);
      p.template pack_columns<kPairs>(values, gathered, &Group<scalar_t>::v, b, h);
      if (dq) p.pack_tokens(key_rows, &Group<scalar_t>::k, b, h);
      acc_t* const dk_sums = sums + 2 * share * task;
      std::fill(dk_sums, dk_sums + 2 * share, acc_t(0));
      tasks.each_block(task, [&](int64_t row, int64_t count) {
        const int64_t at = (b * p.Q + row) * p.C + h * p.d;
        p.template scores<kPairs>(s, p.q + at, q_rows, count, keys);
        p.template scores<kPairs>(ds, dout + at, dout_rows, count, values);
        for (int64_t i = 0; i < count; ++i) {
          for (const auto& g : p.groups) {
            const int64_t j = i * p.Tp + g.first;
            g.template softmax<true>(s + j, ds + j, p.factor, g.weight(b, row + i));
          }
        }
        if (dq) p.weigh(dq + at, ds, key_rows, dq_rows, count);
        if (!p.wanted) return;
        const Rows<acc_t> q_of = p.rows(p.q + at, q_rows, count);
        const Rows<acc_t> dout_of = p.rows(dout + at, dout_rows, count);
        for (const auto& g : p.groups) {
          if (!g.wanted) continue;
          acc_t* const to = dk_sums + g.sums * p.dp;
          add_transposed(to, g.T, p.dp, {ds + g.first, p.Tp}, q_of, count);
          add_transposed(to + share, g.T, p.dp, {s + g.first, p.Tp}, dout_of, count);
        }
      });
    }
  });
  if (!p.wanted) return;
  at::parallel_for(0, p.B * p.H, tasks.grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      acc_t* const first = sums + 2 * share * head * tasks.slots;
      for (int64_t slot = 1; slot < tasks.slots; ++slot)
        at::vec::map2([](auto a, auto c) { return a + c; }, first, first, first + 2 * share * slot,
                      2 * share);
      const int64_t b = head / p.H, h = head % p.H;
      for (const auto& g : p.groups) {
        for (int64_t t = 0; g.wanted && t < g.T; ++t) {
          const int64_t to = (p.B * g.sums + b * g.T + t) * p.C + h * p.d;
          const acc_t* const from = first + (g.sums + t) * p.dp;
          narrow<scalar_t, acc_t>(dk + to, from, nullptr, p.d);
          narrow<scalar_t, acc_t>(dv + to, from + share, nullptr, p.d);
        }
      }
    }
  });
}

// bfloat16 pairs are multiplied as they are when a head holds a whole number of them
template <typename scalar_t, typename Run>
void with_pairs(int64_t d, const Run& run) {
  if constexpr (kHasPairs && std::is_same_v<scalar_t, at::BFloat16>) {
    if (d % 2 == 0) return run(std::true_type{});
  }
  run(std::false_type{});
}

template <typename scalar_t>
Attention<scalar_t> attention(const GivenGroups& given, const at::Tensor& q,
                              at::ArrayRef<double> scales, int64_t heads,
                              const c10::List<bool>* needs) {
  Attention<scalar_t> p(q.size(0), q.size(1), heads, q.size(2), q.const_data_ptr<scalar_t>());
  for (size_t j = 0; j < given.keys.size(); ++j) {
    const at::Tensor& mask = given.masks[j];
    p.add({given.keys[j].const_data_ptr<scalar_t>(), given.values[j].const_data_ptr<scalar_t>(),
           mask.defined() ? mask.const_data_ptr<scalar_t>() : nullptr,
           mask.defined() && mask.size(0) > 1 ? q.size(1) : 0, given.keys[j].size(1),
           j == 0 ? 1.0 : scales[j - 1], needs && needs->get(j + 1)});
  }
  return p;
}

}  // namespace

at::Tensor decoupled_attention_fwd_cpu(const at::Tensor& q, at::TensorList keys,
                                       at::TensorList values, at::ArrayRef<double> scales,
                                       const c10::List<std::optional<at::Tensor>>& masks,
                                       int64_t heads) {
  const GivenGroups given(q, keys, values, scales.size(), masks, heads);
  at::Tensor out = at::empty(q.sizes(), q.options());
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "decoupled_attention", [&] {
        const auto p = attention<scalar_t>(given, q, scales, heads, nullptr);
        auto* const to = out.mutable_data_ptr<scalar_t>();
#if defined(LORAKERN_AMX)
        if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
          if (amx::ready()) return forward<amx::ForwardColumns>(p, to);
        }
#endif
        with_pairs<scalar_t>(
            p.d, [&](auto pairs) { forward<ForwardRows<scalar_t, pairs.value>>(p, to); });
      });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> decoupled_attention_bwd_cpu(
    const at::Tensor& dout, const at::Tensor& q, at::TensorList keys, at::TensorList values,
    at::ArrayRef<double> scales, const c10::List<std::optional<at::Tensor>>& masks, int64_t heads,
    const c10::List<bool>& needs) {
  const GivenGroups given(q, keys, values, scales.size(), masks, heads);
  check_shape(dout, "dout", q.sizes());
  check_contiguous(dout, "dout");
  check_like(dout, "dout", q);
  int64_t rows = 0;
  for (const int64_t n : given.rows(needs)) rows += n;
  const bool need_dq = needs[0];
  at::Tensor dq = need_dq ? at::empty(q.sizes(), q.options()) : at::empty({0}, q.options());
  at::Tensor dk = at::zeros({rows, q.size(2)}, q.options());
  at::Tensor dv = at::zeros({rows, q.size(2)}, q.options());
  if (q.numel() == 0) return {dq, dk, dv};
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, q.scalar_type(), "decoupled_attention", [&] {
        const auto p = attention<scalar_t>(given, q, scales, heads, &needs);
        with_pairs<scalar_t>(p.d, [&](auto pairs) {
          backward<scalar_t, pairs.value>(p, dout.const_data_ptr<scalar_t>(),
                                          need_dq ? dq.mutable_data_ptr<scalar_t>() : nullptr,
                                          dk.mutable_data_ptr<scalar_t>(),
                                          dv.mutable_data_ptr<scalar_t>());
        });
      });
  return {dq, dk, dv};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("decoupled_attention_fwd_cpu", &lorakern::decoupled_attention_fwd_cpu);
  m.def("decoupled_attention_bwd_cpu", &lorakern::decoupled_attention_bwd_cpu);
}
