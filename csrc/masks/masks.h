// Argument checks of the mask kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

namespace refdet {

// COCO's counts are 32-bit: a larger image has no RLE.
inline void check_image(const char* name, int64_t height, int64_t width) {
  TORCH_CHECK(height >= 1 && width >= 1 && height <= int64_t{std::numeric_limits<uint32_t>::max()} / width, name,
              ": an image of ", height, " x ", width, " pixels has no RLE");
}

inline void check_masks_to_rle(const at::Tensor& probabilities, const at::Tensor& boxes, int64_t height, int64_t width,
                               double threshold) {
  TORCH_CHECK(probabilities.dim() == 3 && probabilities.size(1) >= 1 && probabilities.size(1) == probabilities.size(2),
              "masks_to_rle: probabilities must be (N, m, m), got ", probabilities.sizes());
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.size(0) == probabilities.size(0),
              "masks_to_rle: boxes must be (", probabilities.size(0), ", 4) like the masks, got ", boxes.sizes());
  TORCH_CHECK(probabilities.scalar_type() == at::kFloat, "masks_to_rle: probabilities must be float32, got ",
              probabilities.scalar_type());
  TORCH_CHECK(boxes.scalar_type() == at::kFloat, "masks_to_rle: boxes must be float32, got ", boxes.scalar_type());
  check_image("masks_to_rle", height, width);
  TORCH_CHECK(threshold >= 0 && threshold <= 1, "masks_to_rle: threshold must be in 0..1, got ", threshold);
}

inline void check_mask_coverage(const at::Tensor& counts, const at::Tensor& starts, int64_t height, int64_t width,
                                const at::Tensor& boxes, const at::Tensor& objects, int64_t size) {
  TORCH_CHECK(counts.dim() == 1 && counts.scalar_type() == at::kByte,
              "mask_coverage: counts must be one-dimensional uint8, got ", counts.sizes(), " ", counts.scalar_type());
  TORCH_CHECK(starts.dim() == 1 && starts.size(0) >= 1 && starts.scalar_type() == at::kLong,
              "mask_coverage: starts must be (G + 1,) int64, got ", starts.sizes(), " ", starts.scalar_type());
  TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == at::kDouble,
              "mask_coverage: boxes must be (K, 4) float64, got ", boxes.sizes(), " ", boxes.scalar_type());
  TORCH_CHECK(objects.dim() == 1 && objects.size(0) == boxes.size(0) && objects.scalar_type() == at::kLong,
              "mask_coverage: objects must be (", boxes.size(0), ",) int64, one per box, got ", objects.sizes(), " ",
              objects.scalar_type());
  check_image("mask_coverage", height, width);
  TORCH_CHECK(size >= 1 && size <= 4096, "mask_coverage: size must be in 1..4096, got ", size);
}

}  // namespace refdet
