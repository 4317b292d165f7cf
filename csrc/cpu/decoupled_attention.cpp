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
#include "attention_rows.h"

namespace lorakern {
namespace {

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
template <typename Backward, typename scalar_t>
void backward(const Attention<scalar_t>& p, const scalar_t* dout, scalar_t* dq, scalar_t* dk,
              scalar_t* dv) {
  using acc_t = at::opmath_type<scalar_t>;
  const Tasks tasks(p.B * p.H, p.Q, 3 * p.work(), Backward::kTall, Backward::kMost);
  const int64_t share = p.wanted * p.dp;
  // [task, dk or dv, wanted token, dp]
  Scratch<acc_t> shares(2 * share * tasks.count);
  acc_t* const sums = shares.take(2 * share * tasks.count);
  at::parallel_for(0, tasks.count, tasks.grain, [&](int64_t begin, int64_t end) {
    Backward own(p, tasks.block, dq != nullptr);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / tasks.slots, b = head / p.H, h = head % p.H;
      own.head(b, h);
      acc_t* const mine = sums + 2 * share * task;
      std::fill(mine, mine + 2 * share, acc_t(0));
      tasks.each_block(task, [&](int64_t row, int64_t count) {
        own.block(dout, dq, mine, b, h, row, count);
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

template <typename scalar_t, bool kPairs>
struct InRows {
  using Forward = ForwardRows<scalar_t, kPairs>;
  using Backward = BackwardRows<scalar_t, kPairs>;
};

#if defined(LORAKERN_AMX)
struct InColumns {
  using Forward = amx::ForwardColumns;
  using Backward = amx::BackwardColumns;
};
#endif

// bfloat16 pairs are multiplied as they are when a head holds a whole number of them
template <typename scalar_t, typename Run>
void with_kernels(const Attention<scalar_t>& p, const Run& run) {
  if constexpr (kPairsOf<scalar_t>) {
#if defined(LORAKERN_AMX)
    if (amx::ready()) return run(InColumns{});
#endif
    if (p.d % 2 == 0) return run(InRows<scalar_t, true>{});
  }
  run(InRows<scalar_t, false>{});
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
        with_kernels(p, [&](auto kernels) {
          forward<typename decltype(kernels)::Forward>(p, out.mutable_data_ptr<scalar_t>());
        });
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
        with_kernels(p, [&](auto kernels) {
          backward<typename decltype(kernels)::Backward>(
              p, dout.const_data_ptr<scalar_t>(),
              need_dq ? dq.mutable_data_ptr<scalar_t>() : nullptr, dk.mutable_data_ptr<scalar_t>(),
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
