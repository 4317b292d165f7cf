// A group of keys and values of decoupled_attention, and its softmax over a row of scores.

#pragma once

#include <ATen/OpMathType.h>

#include <limits>
#include <type_traits>

#include "pack.h"

namespace lorakern {

template <typename scalar_t>
struct Group {
  using acc_t = at::opmath_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  const scalar_t *k, *v, *mask;
  // between the masks of two images: 0 for one mask that serves all
  int64_t mask_step, T;
  double scale;
  // whether dk and dv are made
  bool wanted;
  // its first column among all keys, and its first row among the wanted ones
  int64_t first = 0, sums = 0;

  acc_t weight(int64_t b, int64_t row) const {
    const acc_t c = scale;
    return mask ? c * static_cast<acc_t>(mask[b * mask_step + row]) : c;
  }

  // to 1 unit in the last place; to 20 where the result is rounded to 16 bits
  static Vec exponential(const Vec& x) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) return x.exp();
    return x.exp_u20();
  }

  // visit(i, keep) for each vector of a row: keep(x, y) is x in lanes of the group, y elsewhere
  template <typename Visit>
  void each_vector(const Visit& visit) const {
    const int64_t whole = T / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) visit(i, [](Vec x, Vec) { return x; });
    if (whole == T) return;
    const Vec inside = Vec::arange(acc_t(0), acc_t(1)) < Vec(acc_t(T - whole));
    visit(whole, [inside](Vec x, Vec y) { return Vec::blendv(y, x, inside); });
  }

  // Scores s[T] become weight * p, p = softmax(factor * s); kBackward: dp[T], the gradient of p
  // before the weight, becomes that of s.
  template <bool kBackward>
  void softmax(acc_t* s, acc_t* dp, acc_t factor, acc_t weight) const {
    Vec top(-std::numeric_limits<acc_t>::infinity()), sum(acc_t(0)), dot(acc_t(0));
    each_vector([&](int64_t i, auto keep) {
      top = at::vec::clamp_min(keep(Vec::loadu(s + i), top), top);
    });
    const auto larger = [](const Vec& a, const Vec& b) { return at::vec::clamp_min(a, b); };
    const Vec largest(at::vec::vec_reduce_all<acc_t>(larger, top)), by_factor(factor);
    each_vector([&](int64_t i, auto keep) {
      const Vec x = Vec::loadu(s + i), e = exponential((x - largest) * by_factor);
      keep(e, x).store(s + i);
      sum = sum + keep(e, Vec(acc_t(0)));
      if constexpr (kBackward) dot = dot + keep(e * Vec::loadu(dp + i), Vec(acc_t(0)));
    });
    const auto plus = [](const Vec& a, const Vec& b) { return a + b; };
    const acc_t share = 1 / at::vec::vec_reduce_all<acc_t>(plus, sum);
    const Vec by(weight * share);
    if constexpr (kBackward) {
      const Vec mean(share * at::vec::vec_reduce_all<acc_t>(plus, dot));
      each_vector([&](int64_t i, auto keep) {
        const Vec x = Vec::loadu(s + i), g = Vec::loadu(dp + i), p = x * by;
        keep(p, x).store(s + i);
        keep((g - mean) * p * by_factor, g).store(dp + i);
      });
    } else {
      each_vector([&](int64_t i, auto keep) {
        const Vec x = Vec::loadu(s + i);
        keep(x * by, x).store(s + i);
      });
    }
  }
};

}  // namespace lorakern
