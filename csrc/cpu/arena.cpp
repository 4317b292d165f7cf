// A clipped step of AdamW over factors in a flat buffer, on CPU. Spec: lorakern/adamw.py
//
// Two passes: one reads the gradients for their norm; one reads gradients, weights, moments and
// average once, and writes all but the first once. Gradients are read where autograd made them:
// there is no flat copy of them, and none that is scaled.

#include "../vec.h"
// at::vec before ATen
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zero.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../adamw.h"
#include "../check.h"

namespace lorakern {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Vec = at::vec::Vectorized<float>;

// elements that a thread takes at a time, and that are summed in float32
constexpr int64_t kPiece = 16384, kChunk = 1024;

// Neighbouring elements of one factor; grad is null where there is none
struct Piece {
  float* grad;
  int64_t place, size;
};

struct Pieces {
  std::vector<at::Tensor> held;
  std::vector<Piece> all;

  // place: of the gradient's first element in the flat buffer
  void add(const OptionalTensor& grad, int64_t place, int64_t size) {
    float* from = nullptr;
    if (grad) {
      TORCH_CHECK_VALUE(grad->scalar_type() == at::kFloat && grad->is_cpu(),
                        "a gradient: want Float on cpu, got ", grad->scalar_type(), " on ",
                        grad->device());
      held.push_back(grad->contiguous());
      from = held.back().mutable_data_ptr<float>();
    }
    for (int64_t i = 0; i < size; i += kPiece)
      all.push_back({from ? from + i : nullptr, place + i, std::min(kPiece, size - i)});
  }

  // visit(number, piece), on all threads
  template <typename Visit>
  void each(const Visit& visit) const {
    at::parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(i, all[i]);
    });
  }
};

Vec load(const float* from, int64_t count) {
  return count < Vec::size() ? Vec::loadu(from, count) : Vec::loadu(from);
}

double sum_of_squares(const float* x, int64_t size) {
  double sum = 0;
  for (int64_t run = 0; run < size; run += kChunk) {
    const int64_t end = std::min(size, run + kChunk);
    Vec sums[4] = {Vec(0), Vec(0), Vec(0), Vec(0)};
    for (int64_t i = run, n = 0; i < end; i += Vec::size(), ++n) {
      const Vec value = load(x + i, end - i);
      sums[n % 4] = at::vec::fmadd(value, value, sums[n % 4]);
    }
    float lanes[Vec::size()];
    ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes);
    for (const float lane : lanes) sum += lane;
  }
  return sum;
}

// Flat buffers; average may be null
struct Flat {
  float *params, *exp_avg, *exp_avg_sq, *average;
};

void step_piece(const Flat& flat, const Piece& piece, const Rates<Vec>& rates, bool zero) {
  for (int64_t i = 0; i < piece.size; i += Vec::size()) {
    const int64_t at = piece.place + i, left = piece.size - i;
    const int count = static_cast<int>(std::min<int64_t>(left, Vec::size()));
    Vec p = load(flat.params + at, left), m = load(flat.exp_avg + at, left),
        v = load(flat.exp_avg_sq + at, left);
    add_gradient(m, v, piece.grad ? load(piece.grad + i, left) : Vec(0), rates);
    p = stepped(p, m, v.sqrt(), rates);
    p.store(flat.params + at, count);
    m.store(flat.exp_avg + at, count);
    v.store(flat.exp_avg_sq + at, count);
    if (flat.average) {
      const Vec a = load(flat.average + at, left);
      (a + rates.to_p * (p - a)).store(flat.average + at, count);
    }
    if (zero && piece.grad) Vec(0).store(piece.grad + i, count);
  }
}

float* like_params(const at::Tensor& t, const char* name, const at::Tensor& params) {
  check_like(t, name, params);
  check_shape(t, name, params.sizes());
  check_contiguous(t, name);
  return t.mutable_data_ptr<float>();
}

}  // namespace

// The norm of all gradients together, a float32 scalar
at::Tensor arena_norm_cpu(const c10::List<OptionalTensor>& grads) {
  Pieces pieces;
  for (const OptionalTensor& grad : grads)
    if (grad) pieces.add(grad, 0, grad->numel());
  std::vector<double> sums(pieces.all.size());
  pieces.each([&](int64_t i, const Piece& p) { sums[i] = sum_of_squares(p.grad, p.size); });
  double sum = 0;
  for (const double part : sums) sum += part;
  return at::scalar_tensor(std::sqrt(sum), at::kFloat);
}

// One step, in place; factors are views of params. 1 where the norm is not finite and all but the
// gradients was left as it was, else 0
at::Tensor arena_step_cpu(const at::Tensor& params, const std::vector<at::Tensor>& factors,
                          const c10::List<OptionalTensor>& grads, const at::Tensor& exp_avg,
                          const at::Tensor& exp_avg_sq, const OptionalTensor& average,
                          const at::Tensor& step, double lr, double weight_decay, double beta1,
                          double beta2, double eps, const OptionalTensor& norm, double largest,
                          double memory, bool zero) {
  TORCH_CHECK_VALUE(params.scalar_type() == at::kFloat && params.is_cpu(),
                    "params: want Float on cpu, got ", params.scalar_type(), " on ",
                    params.device());
  TORCH_CHECK_VALUE(grads.size() == factors.size(), "grads: want ", factors.size(), ", got ",
                    grads.size());
  Flat flat{like_params(params, "params", params), like_params(exp_avg, "exp_avg", params),
            like_params(exp_avg_sq, "exp_avg_sq", params),
            average ? like_params(*average, "average", params) : nullptr};
  check_shape(step, "step", {});
  check_like(step, "step", params);
  const double n = norm ? norm->item<double>() : 0;
  const bool skipped = !is_finite(n);
  if (!skipped) {
    Pieces pieces;
    for (size_t i = 0; i < factors.size(); ++i) {
      const OptionalTensor grad = grads[i];
      if (grad) check_shape(*grad, "a gradient", factors[i].sizes());
      const int64_t place = factors[i].const_data_ptr<float>() - flat.params;
      TORCH_CHECK_VALUE(place >= 0 && place + factors[i].numel() <= params.numel(),
                        "a factor: want a view of params");
      pieces.add(grad, place, factors[i].numel());
    }
    float& count = *step.mutable_data_ptr<float>();
    count += 1;
    const auto rates = rates_of({weight_decay, beta1, beta2, eps}, lr, count,
                                clip_factor(n, largest), memory)
                           .as<Vec>();
    pieces.each([&](int64_t, const Piece& piece) { step_piece(flat, piece, rates, zero); });
  }
  // of a gradient that is not contiguous the pass had a copy
  if (zero)
    for (const OptionalTensor& grad : grads)
      if (grad && (skipped || !grad->is_contiguous())) grad->zero_();
  return at::scalar_tensor(skipped ? 1 : 0, at::kFloat);
}

}  // namespace lorakern

TORCH_LIBRARY_FRAGMENT(lorakern_native, m) {
  m.def("arena_norm_cpu", &lorakern::arena_norm_cpu);
  m.def("arena_step_cpu", &lorakern::arena_step_cpu);
}
