// Argument checks that the CPU and CUDA kernels of nms share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace refdet {

inline void check_nms_ids(const char* name, const std::optional<at::Tensor>& ids, const at::Tensor& boxes) {
  if (!ids) return;
  TORCH_CHECK(ids->dim() == 1 && ids->size(0) == boxes.size(0) && ids->scalar_type() == at::kLong, "nms: ", name,
              " must be (", boxes.size(0), ",) int64, one per box, got ", ids->sizes(), " ", ids->scalar_type());
  TORCH_CHECK(ids->device() == boxes.device(), "nms: boxes are on ", boxes.device(), ", ", name, " on ", ids->device());
}

inline void check_nms(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold,
                      const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be (N, 4), got ", boxes.sizes());
  TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "nms: scores must be (", boxes.size(0),
              ",) like the boxes, got ", scores.sizes());
  TORCH_CHECK(boxes.scalar_type() == at::kFloat && scores.scalar_type() == at::kFloat,
              "nms: boxes and scores must be float32, got ", boxes.scalar_type(), " and ", scores.scalar_type());
  TORCH_CHECK(boxes.device() == scores.device(), "nms: boxes are on ", boxes.device(), ", scores on ", scores.device());
  TORCH_CHECK(iou_threshold >= 0 && iou_threshold <= 1, "nms: iou_threshold must be in 0..1, got ", iou_threshold);
  check_nms_ids("groups", groups, boxes);
  check_nms_ids("images", images, boxes);
}

// Further arguments of nms_padded. The index of an image must fit into the upper half of a sort key on CUDA.
inline void check_nms_padded(int64_t max_keep, int64_t num_images) {
  TORCH_CHECK(max_keep >= 0, "nms: max_keep must not be negative, got ", max_keep);
  TORCH_CHECK(num_images >= 0 && num_images <= std::numeric_limits<int32_t>::max(),
              "nms: num_images must be in 0..2^31-1, got ", num_images);
}

}  // namespace refdet
