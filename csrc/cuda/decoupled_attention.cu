// Launchers of decoupled_attention on CUDA; kernels in decoupled_attention_fwd.cuh and _bwd.cuh.

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "../attention_groups.h"
#include "decoupled_attention_bwd.cuh"
#include "decoupled_attention_fwd.cuh"
#include "launch.h"

namespace lorakern {
namespace {

// keys of a group are counted in int
constexpr int64_t kMostTokens = 1 << 30;

// A call's tensors, at addresses that whole packs are read from
struct Call {
  at::Tensor q;
  GivenGroups given;
  at::ArrayRef<double> scales;
  int64_t B, H, C, blocks;
  AttentionSizes sizes;

  Call(const at::Tensor& q_, at::TensorList keys, at::TensorList values,
       at::ArrayRef<double> scales_, const c10::List<std::optional<at::Tensor>>& masks,
       int64_t heads)
      : given(q_, keys, values, scales_.size(), masks, heads), scales(scales_) {
    const size_t groups = given.keys.size();
    TORCH_CHECK_VALUE(groups <= kMostGroups, "want at most ", kMostGroups, " groups, got ", groups);
    q = aligned(q_);
    B = q.size(0), H = heads, C = q.size(2);
    const int64_t d = C / H, Q = q.size(1);
    int64_t most = 0;
    for (size_t j = 0; j < groups; ++j) {
      given.keys[j] = aligned(given.keys[j]);
      given.values[j] = aligned(given.values[j]);
      most = std::max(most, given.keys[j].size(1));
    }
    TORCH_CHECK_VALUE(most <= kMostTokens, "want at most ", kMostTokens, " keys, got ", most);
    const double scale = 1 / std::sqrt(static_cast<double>(d)), log2_e = 1.4426950408889634;
    // at most a kernel's kMostKeys, which `dispatch` knows
    sizes = {Q, H, static_cast<int>(16 * ceil_div(most, 16)), static_cast<float>(scale),
             static_cast<float>(scale * log2_e)};
    blocks = B * H * ceil_div(Q, kQueries);
  }

  // stats: [wanted groups, 2, B H, Q] or not defined
  template <typename scalar_t>
  AttentionGroups<scalar_t> groups(const at::Tensor& stats,
                                   const std::vector<int64_t>& rows) const {
    AttentionGroups<scalar_t> all;
    all.count = static_cast<int>(given.keys.size());
    float* next = stats.defined() ? stats.mutable_data_ptr<float>() : nullptr;
    for (int j = 0; j < all.count; ++j) {
      const at::Tensor& mask = given.masks[j];
      const bool wanted = stats.defined() && rows[j] > 0;
      all.at[j] = {given.keys[j].const_data_ptr<scalar_t>(),
                   given.values[j].const_data_ptr<scalar_t>(),
                   mask.defined() ? mask.const_data_ptr<scalar_t>() : nullptr,
                   wanted ? next : nullptr,
                   mask.defined() && mask.size(0) > 1 ? sizes.Q : 0,
                   static_cast<int>(given.keys[j].size(1)),
                   j == 0 ? 1.0f : static_cast<float>(scales[j - 1])};
      if (wanted) next += 2 * B * H * sizes.Q;
    }
    return all;
  }
};

template <typename scalar_t, bool kIsBf16, int kChannels>
struct Kind {
  using type = scalar_t;
  static constexpr bool kBf16 = kIsBf16;
  static constexpr int kD = kChannels;
};

// run(Kind, sizes) for the call's dtype and channels of a head
template <typename Run>
void dispatch(const Call& call, const Run& run) {
  const auto of_dtype = [&](auto d) {
    constexpr int kD = decltype(d)::value;
    AttentionSizes sizes = call.sizes;
    sizes.tile = std::min(sizes.tile, kMostKeys<kD>);
    if (call.q.scalar_type() == at::kHalf) return run(Kind<at::Half, false, kD>{}, sizes);
    TORCH_CHECK_VALUE(call.q.scalar_type() == at::kBFloat16, "q: want float16 or bfloat16, got ",
                      call.q.scalar_type());
    run(Kind<at::BFloat16, true, kD>{}, sizes);
  };
  const int64_t d = call.C / call.H;
  TORCH_CHECK_VALUE(d == 40 || d == 80 || d == 160, "q: want 40, 80 or 160 channels a head, got ",
                    d);
  if (d == 40) return of_dtype(std::integral_constant<int, 40>());
  if (d == 80) return of_dtype(std::integral_constant<int, 80>());
  of_dtype(std::integral_constant<int, 160>());
}

// dk and dv of one group, [B T, C] each
template <typename kind>
void key_gradients(at::Tensor dk, at::Tensor dv, const at::Tensor& dout, const Call& call,
                   const AttentionGroup<typename kind::type>& group, const AttentionSizes& sizes) {
  using scalar_t = typename kind::type;
  const int key_warps = group.T <= 16 ? 1 : group.T <= 32 ? 2 : kAttentionWarps;
  const int64_t blocks = call.B * call.H * ceil_div(group.T, 16 * key_warps) * kShares<kind::kD>;
  const int64_t tiles = ceil_div(sizes.Q, kQueries);
  const int64_t share = ceil_div(tiles, std::max<int64_t>(1, kBlocks / blocks));
  const int64_t slices = ceil_div(tiles, share);
  const auto parts = [&] {
    return at::empty({slices * kAttentionWarps / key_warps, dk.size(0), call.C},
                     dk.options().dtype(at::kFloat));
  };
  at::Tensor dk_parts = parts(), dv_parts = parts();
  const size_t rows = 2 * 16 * key_warps + 2 * kQueries;
  launch(&decoupled_attention_dkv_kernel<scalar_t, kind::kBf16, kind::kD>, slices * blocks,
         kAttentionThreads,
         rows * kPitch<kind::kD> * sizeof(scalar_t) + 3 * kQueries * sizeof(float),
         dk_parts.mutable_data_ptr<float>(), dv_parts.mutable_data_ptr<float>(),
         dout.const_data_ptr<scalar_t>(), call.q.const_data_ptr<scalar_t>(), group, sizes, call.B,
         share * kQueries, key_warps);
  sum_parts<scalar_t, float>(dk, dk_parts);
  sum_parts<scalar_t, float>(dv, dv_parts);
}

}  // namespace

at::Tensor decoupled_attention_fwd_cuda(const at::Tensor& q, at::TensorList keys,
                                        at::TensorList values, at::ArrayRef<double> scales,
                                        const c10::List<std::optional<at::Tensor>>& masks,
                                        int64_t heads) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Call call(q, keys, values, scales, masks, heads);
  at::Tensor out = at::empty(q.sizes(), q.options());
  dispatch(call, [&](auto tag, const AttentionSizes& sizes) {
    using kind = decltype(tag);
    using scalar_t = typename kind::type;
    const size_t rows = 2 * sizes.tile + (kHolds<kind::kD> ? 0 : kQueries);
    launch(&decoupled_attention_fwd_kernel<scalar_t, kind::kBf16, kind::kD>, call.blocks,
           kAttentionThreads, rows * kPitch<kind::kD> * sizeof(scalar_t),
           out.mutable_data_ptr<scalar_t>(), call.q.const_data_ptr<scalar_t>(),
           call.groups<scalar_t>({}, {}), sizes);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> decoupled_attention_bwd_cuda(
    const at::Tensor& dout, const at::Tensor& q, at::TensorList keys, at::TensorList values,
    at::ArrayRef<double> scales, const c10::List<std::optional<at::Tensor>>& masks, int64_t heads,
    const c10::List<bool>& needs) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Call call(q, keys, values, scales, masks, heads);
  check_shape(dout, "dout", q.sizes());
  check_like(dout, "dout", q);
  const std::vector<int64_t> rows = call.given.rows(needs);
  int64_t wanted = 0, all_rows = 0;
  for (const int64_t n : rows) wanted += n > 0, all_rows += n;
  const at::Tensor dout_BQC = aligned(dout);
  const bool any = q.numel() > 0;
  at::Tensor dq = make_grad(q, needs[0], any);
  const auto like = [&](at::IntArrayRef sizes) {
    return any ? at::empty(sizes, q.options()) : at::zeros(sizes, q.options());
  };
  at::Tensor dk = like({all_rows, call.C}), dv = like({all_rows, call.C});
  if (!any || (!needs[0] && wanted == 0)) return {dq, dk, dv};

  at::Tensor stats;
  if (wanted > 0)
    stats = at::empty({wanted, 2, call.B * call.H, q.size(1)}, q.options().dtype(at::kFloat));
  dispatch(call, [&](auto tag, const AttentionSizes& sizes) {
    using kind = decltype(tag);
    using scalar_t = typename kind::type;
    const auto groups = call.groups<scalar_t>(stats, rows);
    const size_t staged = 2 * sizes.tile + (kHolds<kind::kD> ? 0 : kQueries);
    launch(&decoupled_attention_dq_kernel<scalar_t, kind::kBf16, kind::kD>, call.blocks,
           kAttentionThreads, staged * kPitch<kind::kD> * sizeof(scalar_t),
           needs[0] ? dq.mutable_data_ptr<scalar_t>() : nullptr,
           dout_BQC.const_data_ptr<scalar_t>(), call.q.const_data_ptr<scalar_t>(), groups, sizes);
    int64_t row = 0;
    for (size_t j = 0; j < rows.size(); row += rows[j++])
      if (rows[j] > 0)
        key_gradients<kind>(dk.narrow(0, row, rows[j]), dv.narrow(0, row, rows[j]), dout_BQC, call,
                            groups.at[j], sizes);
  });
  return {dq, dk, dv};
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("decoupled_attention_fwd_cuda", &lorakern::decoupled_attention_fwd_cuda);
  m.def("decoupled_attention_bwd_cuda", &lorakern::decoupled_attention_bwd_cuda);
}
