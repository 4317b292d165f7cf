// Launchers of lora_linear_shared on CUDA; kernels in lora_linear_shared_fwd.cuh and _bwd.cuh.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../lora_linear_shared_autograd.h"
#include "launch.h"
#include "lora_linear_shared_bwd.cuh"
#include "lora_linear_shared_fwd.cuh"

namespace lorakern {
namespace {

template <typename value_t, typename factors_t, bool kIsBf16>
struct SharedKind {
  using scalar_t = value_t;
  using factor_t = factors_t;
  static constexpr bool kBf16 = kIsBf16;
};

// run(SharedKind) for the dtypes of x and of the factors
template <typename Run>
void dispatch_shared(const at::Tensor& x, const SharedLayers& layers, const Run& run) {
  const bool wide = layers.factors() == at::kFloat;
  if (x.scalar_type() == at::kHalf)
    return wide ? run(SharedKind<at::Half, float, false>{})
                : run(SharedKind<at::Half, at::Half, false>{});
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, "x: want float16 or bfloat16, got ",
                    x.scalar_type());
  wide ? run(SharedKind<at::BFloat16, float, true>{})
       : run(SharedKind<at::BFloat16, at::BFloat16, true>{});
}

SharedSizes sizes_of(const at::Tensor& x, const SharedLayers& layers) {
  const int64_t I = x.size(-1);
  TORCH_CHECK_VALUE(I > 0 && I % 8 == 0, "x: want a multiple of 8 columns, got ", I);
  return {x.numel() / I, I, layers.ranks()};
}

// launch(layers of one launch, their tiles) for all layers; tiles: of a layer
template <typename Layer, typename Tiles, typename Launch>
void each_launch(const std::vector<Layer>& all, const Tiles& tiles, const Launch& launch) {
  for (size_t from = 0; from < all.size(); from += kSharedLayers) {
    LayersOf<Layer> some = {};
    some.count = static_cast<int>(std::min(all.size() - from, size_t{kSharedLayers}));
    int64_t sum = 0;
    for (int j = 0; j < some.count; ++j) {
      some.at[j] = all[from + j];
      some.at[j].tile = static_cast<int>(sum);
      sum += tiles(some.at[j]);
    }
    launch(some, sum);
  }
}

void forward_on_cuda(const at::Tensor& x, const SharedLayers& layers, std::vector<at::Tensor>& ys,
                     at::Tensor& h) {
  const c10::cuda::CUDAGuard guard(x.device());
  const SharedSizes sizes = sizes_of(x, layers);
  const int64_t M = sizes.M, tiles_M = ceil_div(M, kTextRows), slices = ceil_div(sizes.I, kSlice);
  const at::Tensor x_MI = aligned(x);
  at::Tensor parts = at::empty({slices, M, sizes.S}, x.options().dtype(at::kFloat));
  // copies of what is not at an address that packs are read from
  std::vector<at::Tensor> weights;
  for (const at::Tensor& w : layers.weights) weights.push_back(aligned(w));
  dispatch_shared(x, layers, [&](auto kind) {
    using scalar_t = typename decltype(kind)::scalar_t;
    using factor_t = typename decltype(kind)::factor_t;
    constexpr bool kBf16 = decltype(kind)::kBf16;
    using Layer = ForwardLayer<scalar_t, factor_t>;
    std::vector<Layer> all;
    int first = 0;
    for (size_t j = 0; j < layers.size(); ++j) {
      const at::Tensor& bias = layers.biases[j];
      const auto [O, R] = std::pair(layers.ups[j].size(0), layers.ups[j].size(1));
      all.push_back({weights[j].const_data_ptr<scalar_t>(),
                     bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr,
                     layers.downs[j].const_data_ptr<factor_t>(),
                     layers.ups[j].const_data_ptr<factor_t>(),
                     ys[j].mutable_data_ptr<scalar_t>(), static_cast<float>(layers.scales[j]),
                     static_cast<int>(O), static_cast<int>(R), first, 0});
      first += static_cast<int>(R);
    }
    each_launch(
        all, [](const Layer& layer) { return ceil_div(layer.R, kRanks); },
        [&](const LayersOf<Layer>& some, int64_t tiles) {
          launch(&lora_linear_shared_h_kernel<scalar_t, factor_t, kBf16>, tiles * tiles_M * slices,
                 kTextThreads, kSliceShared * sizeof(scalar_t), parts.mutable_data_ptr<float>(),
                 x_MI.const_data_ptr<scalar_t>(), some, sizes);
        });
    each_launch(
        all, [](const Layer& layer) { return ceil_div(layer.O, kTileCols); },
        [&](const LayersOf<Layer>& some, int64_t tiles) {
          launch(&lora_linear_shared_y_kernel<scalar_t, factor_t, kBf16>, tiles * tiles_M,
                 kTileThreads, kTileShared * sizeof(scalar_t), h.mutable_data_ptr<scalar_t>(),
                 parts.const_data_ptr<float>(), x_MI.const_data_ptr<scalar_t>(), some, sizes);
        });
  });
}

SharedGradients backward_on_cuda(const at::Tensor& x, const at::Tensor& h,
                                 const std::vector<at::Tensor>& dys, const SharedLayers& layers,
                                 const std::vector<bool>& needs) {
  TORCH_CHECK_VALUE(!needs[0], "dx: this kernel makes the gradients of downs and ups alone");
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::cuda::CUDAGuard guard(x.device());
  const SharedSizes sizes = sizes_of(x, layers);
  const int64_t M = sizes.M, tiles_I = ceil_div(sizes.I, kDownCols);
  // no rows: no block runs, and the sums are 0
  SharedGradients grads = make_gradients(x, layers, needs, [&](const at::Tensor& factor) {
    return M > 0 ? at::empty(factor.sizes(), factor.options())
                 : at::zeros(factor.sizes(), factor.options());
  });
  if (M == 0) return grads;
  const at::Tensor x_MI = aligned(x);
  std::vector<at::Tensor> given;
  int64_t count = 0;
  for (size_t j = 0; j < layers.size(); ++j) {
    given.push_back(aligned(dys[j]));
    if (grads.ddowns[j].defined())
      count += ceil_div(layers.ups[j].size(0), kGradCols) * M * layers.ups[j].size(1);
  }
  at::Tensor parts = at::empty({count}, x.options().dtype(at::kFloat));
  dispatch_shared(x, layers, [&](auto kind) {
    using scalar_t = typename decltype(kind)::scalar_t;
    using factor_t = typename decltype(kind)::factor_t;
    constexpr bool kBf16 = decltype(kind)::kBf16;
    using Layer = BackwardLayer<scalar_t, factor_t>;
    const auto or_null = [](const at::Tensor& t) {
      return t.defined() ? t.mutable_data_ptr<factor_t>() : nullptr;
    };
    float* next = parts.mutable_data_ptr<float>();
    std::vector<Layer> all, with_down;
    int first = 0;
    for (size_t j = 0; j < layers.size(); ++j) {
      const int O = static_cast<int>(layers.ups[j].size(0)), R = layers.ups[j].size(1);
      factor_t *const ddown = or_null(grads.ddowns[j]), *const dup = or_null(grads.dups[j]);
      const Layer layer = {given[j].const_data_ptr<scalar_t>(),
                           layers.ups[j].const_data_ptr<factor_t>(), ddown ? next : nullptr, ddown,
                           dup, static_cast<float>(layers.scales[j]), O, R, first, 0};
      if (ddown || dup) all.push_back(layer);
      if (ddown) {
        with_down.push_back(layer);
        next += ceil_div(O, kGradCols) * M * R;
      }
      first += R;
    }
    each_launch(
        all,
        [](const Layer& layer) { return ceil_div(layer.O, kGradCols) * ceil_div(layer.R, kRanks); },
        [&](const LayersOf<Layer>& some, int64_t tiles) {
          launch(&lora_linear_shared_dup_kernel<scalar_t, factor_t, kBf16>, tiles, kTextThreads,
                 kGradShared * sizeof(scalar_t), h.const_data_ptr<scalar_t>(), some, sizes);
        });
    each_launch(
        with_down, [&](const Layer& layer) { return tiles_I * ceil_div(layer.R, kRanks); },
        [&](const LayersOf<Layer>& some, int64_t tiles) {
          launch(&lora_linear_shared_ddown_kernel<scalar_t, factor_t, kBf16>, tiles, kDownThreads,
                 kDownShared * sizeof(scalar_t), x_MI.const_data_ptr<scalar_t>(), some, sizes);
        });
  });
  return grads;
}

// float32 factors are read as they are: a cast of each would be a launch
struct SharedOnCuda {
  static constexpr bool kMixed = true;
  static constexpr auto forward = forward_on_cuda;
  static constexpr auto backward = backward_on_cuda;
};

}  // namespace
}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("lora_linear_shared_fwd_cuda",
        &lorakern::lora_linear_shared_fwd<lorakern::SharedOnCuda>);
  m.def("lora_linear_shared_bwd_cuda",
        &lorakern::lora_linear_shared_bwd<lorakern::SharedOnCuda>);
  m.def("lora_linear_shared_cuda", &lorakern::lora_linear_shared<lorakern::SharedOnCuda>);
}
