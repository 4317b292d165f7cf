// Gradients of factors that were summed in parts, one a thread or a tile: added in order.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "pack.h"

namespace lorakern {

// times · the sum of `count` matrices [rows, ld], each `apart` values behind the one before, as
// [rows, cols], rounded once
template <typename scalar_t, typename acc_t>
at::Tensor sum_of_parts(const acc_t* parts, int64_t count, int64_t apart, int64_t rows, int64_t ld,
                        int64_t cols, acc_t times, const at::TensorOptions& like) {
  at::Tensor out = at::empty({rows, cols}, like.dtype(c10::CppTypeToScalarType<scalar_t>::value));
  scalar_t* to = out.mutable_data_ptr<scalar_t>();
  // so many rows at a time that they stay in L1, and are read as one run of each part
  const int64_t block = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, ld));
  std::vector<acc_t> sums(block * ld);
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t some = std::min(block, rows - row);
    std::fill(sums.begin(), sums.end(), acc_t(0));
    for (int64_t part = 0; part < count; ++part) {
      const acc_t* const from = parts + part * apart + row * ld;
      for (int64_t j = 0; j < some * ld; ++j) sums[j] += from[j];
    }
    for (acc_t& sum : sums) sum *= times;
    for (int64_t i = 0; i < some; ++i, to += cols)
      narrow<scalar_t, acc_t>(to, sums.data() + i * ld, nullptr, cols);
  }
  return out;
}

}  // namespace lorakern
