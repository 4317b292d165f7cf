// The groups of a call of decoupled_attention, checked.

#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "check.h"

namespace lorakern {

// Contiguous keys, values and masks; a mask that is not there is not defined, as is the text's
struct GivenGroups {
  std::vector<at::Tensor> keys, values, masks;

  GivenGroups(const at::Tensor& q, at::TensorList k, at::TensorList v, size_t scales,
              const c10::List<std::optional<at::Tensor>>& m, int64_t heads) {
    TORCH_CHECK_VALUE(q.dim() == 3 && heads > 0 && q.size(2) % heads == 0,
                      "q: want shape [B, Q, heads * d], got ", q.sizes(), " for ", heads, " heads");
    TORCH_CHECK_VALUE(
        !k.empty() && v.size() == k.size() && scales + 1 == k.size() && m.size() == scales,
        "want as many values as keys and one scale and mask less, got ", k.size(), " keys, ",
        v.size(), " values, ", scales, " scales, ", m.size(), " masks");
    check_contiguous(q, "q");
    for (size_t j = 0; j < k.size(); ++j) {
      check_shape(k[j], "key", {q.size(0), k[j].size(1), q.size(2)});
      check_shape(v[j], "value", k[j].sizes());
      check_like(k[j], "key", q);
      check_like(v[j], "value", q);
      keys.push_back(k[j].contiguous());
      values.push_back(v[j].contiguous());
      const auto mask = j == 0 ? std::nullopt : m.get(j - 1);
      masks.push_back(mask ? mask->contiguous() : at::Tensor());
      if (!mask) continue;
      check_shape(*mask, "mask", {mask->size(0) == 1 ? 1 : q.size(0), q.size(1)});
      check_like(*mask, "mask", q);
    }
  }

  // rows of a wanted group's gradient, by group; 0 where it is not wanted
  std::vector<int64_t> rows(const c10::List<bool>& needs) const {
    TORCH_CHECK_VALUE(needs.size() == keys.size() + 1, "needs: want ", keys.size() + 1, ", got ",
                      needs.size());
    std::vector<int64_t> found;
    for (size_t j = 0; j < keys.size(); ++j)
      found.push_back(needs[j + 1] ? keys[j].size(0) * keys[j].size(1) : 0);
    return found;
  }
};

}  // namespace lorakern
