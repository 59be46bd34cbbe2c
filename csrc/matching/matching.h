// Argument checks and outputs that the CPU and CUDA kernels of match_boxes share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <tuple>

namespace refdet {

// best (N,), object (N,), reaches (N,).
using Matches = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline void check_match_boxes(const at::Tensor& candidates, const at::Tensor& objects) {
  for (const at::Tensor& boxes : {candidates, objects}) {
    TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "match_boxes: boxes must be (N, 4) and (M, 4), got ",
                candidates.sizes(), " and ", objects.sizes());
    TORCH_CHECK(boxes.scalar_type() == at::kFloat, "match_boxes: boxes must be float32, got ", candidates.scalar_type(),
                " and ", objects.scalar_type());
  }
  TORCH_CHECK(candidates.device() == objects.device(), "match_boxes: candidates are on ", candidates.device(),
              ", objects on ", objects.device());
  TORCH_CHECK(objects.size(0) <= std::numeric_limits<int32_t>::max(), "match_boxes: ", objects.size(0),
              " objects are too many");
}

}  // namespace refdet
