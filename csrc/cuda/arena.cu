// Launchers of a clipped step of AdamW on CUDA; kernels in arena.cuh.

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arena.cuh"
#include "launch.h"

namespace lorakern {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// t's values; of `size` of them, in float32 on like's device
float* values(const at::Tensor& t, const char* name, const at::Tensor& like, int64_t size) {
  check_like(t, name, like, at::kFloat);
  check_contiguous(t, name);
  TORCH_CHECK_VALUE(t.numel() == size, name, ": want ", size, " elements, got ", t.numel());
  return t.mutable_data_ptr<float>();
}

// The chunks of its segments are counted, and whether packs may be read
void add(std::vector<ArenaSegments>& launches, ArenaSegment segment) {
  if (launches.empty() || launches.back().count == kArenaSegments) launches.push_back({});
  ArenaSegments& last = launches.back();
  segment.packed = true;
  for (const float* from : {segment.params, segment.grad, segment.exp_avg, segment.exp_avg_sq,
                            segment.average})
    segment.packed &= reinterpret_cast<uintptr_t>(from) % alignof(ArenaPack) == 0;
  segment.chunk = last.chunks;
  last.chunks += ceil_div(segment.size, kArenaChunk);
  last.at[last.count++] = segment;
}

int64_t blocks_of(const ArenaSegments& segments) { return std::min(kBlocks, segments.chunks); }

}  // namespace

// The norm of all gradients together, a float32 scalar
at::Tensor arena_norm_cuda(const std::vector<at::Tensor>& grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "grads: want one or more, got none");
  const c10::cuda::CUDAGuard guard(grads[0].device());
  std::vector<ArenaSegments> launches;
  for (const at::Tensor& grad : grads) {
    ArenaSegment segment = {};
    segment.grad = values(grad, "a gradient", grads[0], grad.numel());
    segment.size = grad.numel();
    add(launches, segment);
  }
  int64_t count = 0;
  for (const ArenaSegments& segments : launches) count += blocks_of(segments);
  at::Tensor parts = at::empty({count}, grads[0].options().dtype(at::kDouble)),
             norm = at::empty({}, grads[0].options());
  double* to = parts.mutable_data_ptr<double>();
  for (const ArenaSegments& segments : launches) {
    launch(&arena_squares_kernel, blocks_of(segments), kArenaThreads, 0, to, segments);
    to += blocks_of(segments);
  }
  launch(&arena_norm_kernel, 1, kArenaThreads, 0, norm.mutable_data_ptr<float>(),
         parts.const_data_ptr<double>(), count);
  return norm;
}

// One step of every segment, in place; averages: one a segment, or none at all; hypers: of each
// segment weight decay, both betas, eps. 1 where the norm is not finite and all but the gradients
// was left as it was, else 0
at::Tensor arena_step_cuda(const std::vector<at::Tensor>& params,
                           const std::vector<at::Tensor>& grads,
                           const std::vector<at::Tensor>& exp_avgs,
                           const std::vector<at::Tensor>& exp_avg_sqs,
                           const std::vector<at::Tensor>& steps,
                           const std::vector<at::Tensor>& averages,
                           const std::vector<at::Tensor>& lrs, const std::vector<double>& hypers,
                           const OptionalTensor& norm, double largest, double memory, bool zero) {
  TORCH_CHECK_VALUE(!params.empty(), "params: want one or more, got none");
  const at::Tensor& first = params[0];
  const size_t count = params.size();
  TORCH_CHECK_VALUE(grads.size() == count && exp_avgs.size() == count &&
                        exp_avg_sqs.size() == count && steps.size() == count &&
                        lrs.size() == count && hypers.size() == 4 * count &&
                        (averages.empty() || averages.size() == count),
                    "want as many of all as of params: ", count);
  const c10::cuda::CUDAGuard guard(first.device());
  std::vector<ArenaSegments> launches;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    ArenaSegment segment = {};
    segment.params = values(params[i], "params", first, size);
    segment.grad = values(grads[i], "a gradient", first, size);
    segment.exp_avg = values(exp_avgs[i], "exp_avg", first, size);
    segment.exp_avg_sq = values(exp_avg_sqs[i], "exp_avg_sq", first, size);
    if (!averages.empty()) segment.average = values(averages[i], "average", first, size);
    segment.step = values(steps[i], "step", first, 1);
    segment.lr = values(lrs[i], "lr", first, 1);
    const double* const hyper = hypers.data() + 4 * i;
    segment.hyper = {hyper[0], hyper[1], hyper[2], hyper[3]};
    segment.size = size;
    add(launches, segment);
  }
  const float* const of_norm = norm ? values(*norm, "norm", first, 1) : nullptr;
  constexpr int64_t kNumbers = sizeof(Rates<float>) / sizeof(float);
  at::Tensor rates = at::empty({kArenaSegments * static_cast<int64_t>(launches.size()), kNumbers},
                               first.options()),
             skipped = at::empty({}, first.options());
  float* const flag = skipped.mutable_data_ptr<float>();
  auto* of_launch = reinterpret_cast<Rates<float>*>(rates.mutable_data_ptr<float>());
  const auto step = averages.empty()
                        ? (zero ? arena_step_kernel<false, true> : arena_step_kernel<false, false>)
                        : (zero ? arena_step_kernel<true, true> : arena_step_kernel<true, false>);
  for (const ArenaSegments& segments : launches) {
    launch(&arena_rates_kernel, 1, kArenaSegments, 0, of_launch, flag, of_norm, largest, memory,
           segments);
    launch(step, blocks_of(segments), kArenaThreads, 0, of_launch, flag, segments);
    of_launch += kArenaSegments;
  }
  return skipped;
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("arena_norm_cuda", &lorakern::arena_norm_cuda);
  m.def("arena_step_cuda", &lorakern::arena_step_cuda);
}
