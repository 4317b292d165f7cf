// lora_linear_shared on CPU. Spec: lorakern/ops/lora_linear_shared/reference.py
//
// One call of lora_linear a layer reads x once a layer, writes a dx each, and adds those up after they
// were rounded. Here a block of rows of x, or of all dys, stays in cache for every layer
// (shared_block.h): x is read and dx written once, and the layers add to one sum of dx. Where torch's
// base products are the faster ones (linear.h), such a block gets the updates alone.

#include "lora_linear_shared.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "linear.h"
#include "shared_block.h"

namespace lorakern {
namespace {

// packed weights that go through forward together: what an L2 holds
constexpr int64_t kTogetherBytes = 2 << 20;

// whole panels of columns, so that the next layer starts with a panel of its own
template <typename acc_t>
int64_t whole_panels(int64_t columns) {
  return (columns + kPanel<acc_t> - 1) / kPanel<acc_t> * kPanel<acc_t>;
}

// of a layer on average: they are packed one by one
bool adds_to_torch(const at::Tensor& x, int64_t M, const SharedLayers& layers, bool backward) {
  const int64_t n = layers.size(), I = x.size(-1);
  int64_t O = 0;
  for (const at::Tensor& w : layers.weights) O += w.size(0);
  return by_torch(x, M, backward ? O / n : I, backward ? I : O / n, backward);
}

template <typename scalar_t>
scalar_t* mutable_or_null(const at::Tensor& t) {
  return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr;
}

}  // namespace

void shared_forward(const at::Tensor& x, const SharedLayers& layers, std::vector<at::Tensor>& ys,
                    at::Tensor& h) {
  const int64_t I = x.size(-1), S = layers.ranks(), M = rows_in(h);
  if (M == 0) return;
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor down = at::cat(layers.downs);
  const bool adds = adds_to_torch(x, M, layers, false);
  for (size_t j = 0; adds && j < layers.size(); ++j)
    torch_product(ys[j], x, layers.weights[j].t(), layers.biases[j]);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    SharedLayersOf<scalar_t> given;
    int64_t col = 0, first = 0, columns = 0;
    for (size_t j = 0; j < layers.size(); ++j) {
      const int64_t O = layers.weights[j].size(0), R = layers.downs[j].size(0);
      given.push_back({O, R, col, first, layers.scales[j], data<scalar_t>(layers.weights[j]),
                       data<scalar_t>(layers.ups[j]), data_or_null<scalar_t>(layers.biases[j]),
                       nullptr, ys[j].mutable_data_ptr<scalar_t>()});
      columns = col + O;
      col += whole_panels<at::opmath_type<scalar_t>>(O);
      first += R;
    }
    with_pairs<scalar_t>(I, [&](auto pairs) {
      const auto run = [&](const SharedLayersOf<scalar_t>& some, int64_t N, int64_t R,
                           int64_t from) {
        const LowRank<scalar_t> p{M, I, N, R, data<scalar_t>(x), nullptr,
                                  data<scalar_t>(down) + from * I, nullptr, nullptr, true, nullptr,
                                  x.options()};
        SharedForward<scalar_t, pairs.value> op{{p}, some, h.mutable_data_ptr<scalar_t>() + from,
                                                S};
        const Rows rows = rows_of(op);
        // Panels that do not stay in L2 together, or that meet one block of rows only, would push
        // each other out.
        const int64_t bytes = N * (op.lanes() + R) * sizeof(at::opmath_type<scalar_t>);
        if (!adds && some.size() > 1 &&
            (rows.block == rows.per_slot || bytes > kTogetherBytes))
          return false;
        run_product(op, rows, adds);
        return true;
      };
      if (run(given, columns, S, 0)) return;
      for (SharedLayer<scalar_t> l : given) {
        const int64_t from = l.first;
        l.at = l.first = 0;
        run({l}, l.O, l.R, from);
      }
    });
  });
}

SharedGradients shared_backward(const at::Tensor& x, const at::Tensor& h,
                                const std::vector<at::Tensor>& dys, const SharedLayers& layers,
                                const std::vector<bool>& needs) {
  const size_t n = layers.size();
  const int64_t I = x.size(-1), S = layers.ranks(), M = rows_in(h);
  SharedGradients grads = make_gradients(x, layers, needs, [&](const at::Tensor& t) {
    return M > 0 ? at::empty(t.sizes(), x.options()) : at::zeros(t.sizes(), x.options());
  });
  bool need_dh = needs[0];
  for (size_t j = 0; j < n; ++j) need_dh = need_dh || needs[1 + j];
  if (M == 0) return grads;
  const at::AutoDispatchBelowADInplaceOrView below;
  const bool adds = needs[0] && adds_to_torch(x, M, layers, true);
  for (size_t j = 0; adds && j < n; ++j)
    torch_product(grads.dx, dys[j], layers.weights[j], {}, j > 0);
  const at::Tensor down = at::cat(layers.downs);
  bool even = true;
  for (const at::Tensor& w : layers.weights) even = even && w.size(0) % 2 == 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lora_linear", [&] {
    with_pairs<scalar_t>(even ? 2 : 1, [&](auto pairs) {
      constexpr bool kPairs = pairs.value;
      using Op = SharedBackward<scalar_t, kPairs>;
      SharedLayersOf<scalar_t> given;
      std::vector<Factors<scalar_t>> factors;
      std::vector<std::pair<size_t, int64_t>> passes;
      int64_t K = 0, lane = 0, first = 0;
      for (size_t j = 0; j < n; ++j) {
        const int64_t O = layers.weights[j].size(0), R = layers.downs[j].size(0);
        const scalar_t* const dy = data<scalar_t>(dys[j]);
        given.push_back({O, R, lane, first, layers.scales[j], data<scalar_t>(layers.weights[j]),
                         data<scalar_t>(layers.ups[j]), nullptr, dy, nullptr});
        factors.push_back({O, R, first, layers.scales[j], dy,
                           mutable_or_null<scalar_t>(grads.ddowns[j]),
                           mutable_or_null<scalar_t>(grads.dups[j])});
        for (int64_t from = 0; from < Op::lanes_of(given[j]); from += kDepth)
          passes.emplace_back(j, from);
        K += O;
        lane += Op::lanes_of(given[j]);
        first += R;
      }
      const LowRank<scalar_t> p{M, K, needs[0] ? I : 0, need_dh ? S : 0, nullptr, nullptr, nullptr,
                                data<scalar_t>(down), nullptr, false,
                                needs[0] ? grads.dx.mutable_data_ptr<scalar_t>() : nullptr,
                                x.options()};
      const Rows rows(M, lane, sizeof(at::opmath_type<scalar_t>), M * K * I, kHeight<kPairs>);
      Op op{{p}, given,
            {std::move(factors), data<scalar_t>(x), data<scalar_t>(h), I, S, rows, x.options()},
            std::move(passes)};
      run_product(op, rows, adds);
      op.factors.write();
    });
  });
  return grads;
}

}  // namespace lorakern
