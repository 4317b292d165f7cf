// lora_linear_shared as torch ops, and with its gradient as one call: a C++ autograd node, which costs
// small layers a third of what a Python one does.
//
// x, downs and ups get gradients. Saved: x once, unless every down is frozen, and h [M, S].
//
// Kernels: kMixed, whether float32 factors go beside 16-bit; forward(x, layers, ys, h), which writes
// ys[j] [..., O] and h [..., S]; and backward(x, h, dys, layers, needs), the SharedGradients.

#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

#include "once.h"
#include "shared_layers.h"

namespace lorakern {

using SharedBiases = c10::List<std::optional<at::Tensor>>;

template <typename Kernels>
struct LoraLinearShared : torch::autograd::Function<LoraLinearShared<Kernels>> {
  using variable_list = torch::autograd::variable_list;
  using AutogradContext = torch::autograd::AutogradContext;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList downs,
                               at::TensorList ups, const std::vector<at::Tensor>& weights,
                               const SharedBiases& biases, const std::vector<double>& scales) {
    const SharedLayers layers(weights, biases, downs, ups, scales);
    layers.check(x, Kernels::kMixed);
    variable_list ys;
    for (const at::Tensor& w : weights) ys.push_back(rows_like(x, w.size(0)));
    at::Tensor h = rows_like(x, layers.ranks());
    Kernels::forward(x, layers, ys, h);
    bool keep_x = false;
    for (const at::Tensor& down : downs) keep_x = keep_x || down.requires_grad();
    // frozen downs ask x for no more than its shape
    variable_list saved = {keep_x ? x : at::Tensor(), h};
    for (const at::TensorList& each : {at::TensorList(weights), downs, ups})
      saved.insert(saved.end(), each.begin(), each.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scales"] = scales;
    ctx->set_materialize_grads(false);
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const auto saved = ctx->get_saved_variables();
    const auto scales = ctx->saved_data["scales"].toDoubleVector();
    const size_t n = dys.size();
    // x, downs and ups, then what has none
    variable_list grads(1 + 2 * n + 3);
    // a layer whose output reached no loss has no part in this
    std::vector<size_t> live;
    for (size_t j = 0; j < n; ++j)
      if (dys[j].defined()) live.push_back(j);
    if (live.empty()) return grads;

    variable_list given, weights, downs, ups, hs;
    SharedBiases biases;
    std::vector<double> live_scales;
    std::vector<bool> needs = {ctx->needs_input_grad(0)};
    for (int64_t j = 0, first = 0; j < static_cast<int64_t>(n); ++j) {
      const at::Tensor& down = saved[2 + n + j];
      if (dys[j].defined()) {
        given.push_back(dys[j].contiguous());
        weights.push_back(saved[2 + j]);
        biases.push_back(std::nullopt);
        downs.push_back(down);
        ups.push_back(saved[2 + 2 * n + j]);
        live_scales.push_back(scales[j]);
        hs.push_back(saved[1].narrow(-1, first, down.size(0)));
      }
      first += down.size(0);
    }
    for (const size_t kind : {0, 1})
      for (const size_t j : live) needs.push_back(ctx->needs_input_grad(1 + kind * n + j));
    const SharedLayers layers(weights, biases, downs, ups, live_scales);
    const at::Tensor h = live.size() == n ? saved[1] : at::cat(hs, -1);
    const at::Tensor x = saved[0].defined() ? saved[0] : rows_like(h, downs[0].size(1));
    SharedGradients got = Kernels::backward(x, h, given, layers, needs);
    grads[0] = got.dx;
    for (size_t i = 0; i < live.size(); ++i) {
      grads[1 + live[i]] = got.ddowns[i];
      grads[1 + n + live[i]] = got.dups[i];
    }
    return once(std::move(grads), "lora_linear_shared");
  }
};

template <typename Kernels>
std::vector<at::Tensor> lora_linear_shared(const at::Tensor& x, at::TensorList weights,
                                           const SharedBiases& biases, at::TensorList downs,
                                           at::TensorList ups, at::ArrayRef<double> scales) {
  return LoraLinearShared<Kernels>::apply(x, downs, ups, weights.vec(), biases, scales.vec());
}

template <typename Kernels>
std::tuple<at::Tensor, at::Tensor> lora_linear_shared_fwd(
    const at::Tensor& x, at::TensorList weights, const SharedBiases& biases, at::TensorList downs,
    at::TensorList ups, at::ArrayRef<double> scales) {
  const SharedLayers layers(weights, biases, downs, ups, scales);
  layers.check(x, Kernels::kMixed);
  at::Tensor h = rows_like(x, layers.ranks());
  const int64_t M = x.numel() / std::max<int64_t>(x.size(-1), 1);
  int64_t columns = 0;
  for (const at::Tensor& w : weights) columns += w.size(0);
  at::Tensor y = at::empty({M * columns}, x.options());
  std::vector<at::Tensor> ys;
  for (int64_t j = 0, from = 0; j < static_cast<int64_t>(layers.size()); ++j) {
    const int64_t O = weights[j].size(0);
    ys.push_back(y.narrow(0, from, M * O).view({M, O}));
    from += M * O;
  }
  Kernels::forward(x, layers, ys, h);
  return {y, h};
}

template <typename Kernels>
std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_linear_shared_bwd(
    const at::Tensor& x, const at::Tensor& h, at::TensorList dys, at::TensorList weights,
    at::TensorList downs, at::TensorList ups, at::ArrayRef<double> scales,
    const c10::List<bool>& needs) {
  SharedBiases biases;
  for (size_t j = 0; j < weights.size(); ++j) biases.push_back(std::nullopt);
  const SharedLayers layers(weights, biases, downs, ups, scales);
  layers.check(x, Kernels::kMixed);
  check_contiguous(h, "h");
  check_like(h, "h", x);
  const int64_t M = x.numel() / std::max<int64_t>(x.size(-1), 1);
  TORCH_CHECK_VALUE(h.numel() == M * layers.ranks() && dys.size() == layers.size() &&
                        needs.size() == 1 + 2 * dys.size(),
                    "want h [..., ", layers.ranks(), "] of ", M, " rows, and ", layers.size(),
                    " dys, got h ", h.sizes(), " and ", dys.size(), " dys");
  for (size_t j = 0; j < layers.size(); ++j) {
    check_contiguous(dys[j], "dy");
    check_like(dys[j], "dy", x);
    TORCH_CHECK_VALUE(dys[j].numel() == M * weights[j].size(0), "dy: want ", M, " rows of ",
                      weights[j].size(0), ", got ", dys[j].sizes());
  }
  const std::vector<bool> wanted(needs.begin(), needs.end());
  const SharedGradients grads = Kernels::backward(x, h, dys.vec(), layers, wanted);
  const auto flat = [&](const std::vector<at::Tensor>& parts) {
    std::vector<at::Tensor> there = {at::empty({0}, downs[0].options())};
    for (const at::Tensor& part : parts)
      if (part.defined()) there.push_back(part.flatten());
    return at::cat(there);
  };
  const at::Tensor dx = grads.dx.defined() ? grads.dx : at::empty({0}, x.options());
  return {dx, flat(grads.ddowns).view({-1, x.size(-1)}), flat(grads.dups)};
}

}  // namespace lorakern
