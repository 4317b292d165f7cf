// A Hadamard update of small ranks as one low-rank product (hada_linear.cpp).

#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <array>

namespace lorakern {

// The update as one low-rank product, up [O, R·S] down [R·S, I], and its gradients' way back.
struct KhatriRao {
  const at::Tensor &down1, &up1, &down2, &up2;
  at::Tensor down, up;

  KhatriRao(const at::Tensor& down1, const at::Tensor& up1, const at::Tensor& down2,
            const at::Tensor& up2)
      : down1(down1), up1(up1), down2(down2), up2(up2),
        down((down1.unsqueeze(1) * down2.unsqueeze(0)).flatten(0, 1)),
        up((up1.unsqueeze(2) * up2.unsqueeze(1)).flatten(1)) {}

  std::array<at::Tensor, 4> back(const at::Tensor& ddown, const at::Tensor& dup,
                                 const bool* needs) const {
    const auto type = down.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t R = down1.size(0), S = down2.size(0);
    const auto sum = [&](bool need, const at::Tensor& grad, at::IntArrayRef sizes,
                         const at::Tensor& other, int64_t over) {
      if (!need) return at::empty({0}, down.options());
      return (grad.to(type).view(sizes) * other.to(type)).sum(over).to(down.scalar_type());
    };
    const std::array<int64_t, 3> of_down = {R, S, down1.size(1)}, of_up = {up1.size(0), R, S};
    return {sum(needs[0], ddown, of_down, down2.unsqueeze(0), 1),
            sum(needs[1], dup, of_up, up2.unsqueeze(1), 2),
            sum(needs[2], ddown, of_down, down1.unsqueeze(1), 0),
            sum(needs[3], dup, of_up, up1.unsqueeze(2), 1)};
  }
};

// its four products of rank R·S against one with the weight
inline bool prefers_khatri_rao(int64_t R, int64_t S, int64_t O, int64_t I) {
  return 10 * 2 * R * S * (O + I) < 8 * O * I;
}

}  // namespace lorakern
