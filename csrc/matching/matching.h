// Argument checks and outputs that the CPU and CUDA kernels of match_boxes share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cstdint>
#include <limits>
#include <tuple>

namespace refdet {

// The smallest divisor of an IoU: no IoU divides by 0, even where the union is empty and the quotient is not used.
constexpr float kMinUnion = 1e-12f;

// max_iou, object and is_best, the fields of Matches in refdet/ops/matching.py.
using Matches = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Sizes of a problem: candidates (N, 4) and objects (M, 4) of one image; or, for B images, candidates (B, N, 4), or
// (N, 4) that all images share, and objects (B, M, 4).
struct MatchSizes {
  int64_t images, candidates, objects;
  bool shared;  // whether all images have the same candidates

  // Offset of an image's first candidate, in boxes.
  int64_t first_candidate(int64_t image) const { return shared ? 0 : image * candidates; }
};

inline MatchSizes check_match_boxes(const at::Tensor& candidates, const at::Tensor& objects) {
  for (const at::Tensor& boxes : {candidates, objects}) {
    TORCH_CHECK((boxes.dim() == 2 || boxes.dim() == 3) && boxes.size(-1) == 4,
                "match_boxes: boxes must be (N, 4) and (M, 4), or (B, N, 4) and (B, M, 4), got ", candidates.sizes(),
                " and ", objects.sizes());
    TORCH_CHECK(boxes.scalar_type() == at::kFloat, "match_boxes: boxes must be float32, got ", candidates.scalar_type(),
                " and ", objects.scalar_type());
  }
  TORCH_CHECK(candidates.dim() == 2 || (objects.dim() == 3 && candidates.size(0) == objects.size(0)),
              "match_boxes: candidates and objects must have the same number of images, got ", candidates.sizes(),
              " and ", objects.sizes());
  TORCH_CHECK(candidates.device() == objects.device(), "match_boxes: candidates are on ", candidates.device(),
              ", objects on ", objects.device());
  const MatchSizes sizes{objects.dim() == 3 ? objects.size(0) : 1, candidates.size(-2), objects.size(-2),
                         candidates.dim() == 2};
  TORCH_CHECK(sizes.objects <= std::numeric_limits<int32_t>::max(), "match_boxes: ", sizes.objects,
              " objects are too many");
  return sizes;
}

// A zeroed output of the kernels: (N,) for one image, (B, N) for B images.
inline at::Tensor match_output(const at::Tensor& candidates, const at::Tensor& objects, at::ScalarType type) {
  const auto options = candidates.options().dtype(type);
  if (objects.dim() == 2) return at::zeros({candidates.size(-2)}, options);
  return at::zeros({objects.size(0), candidates.size(-2)}, options);
}

}  // namespace refdet
