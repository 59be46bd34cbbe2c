// The operators of refdet as PyTorch sees them. The kernels register themselves, each in its own file, and the
// fake implementations and plain fallbacks stand in refdet/ops beside the functions people call.

#include <torch/library.h>

#include "gemm.h"

TORCH_LIBRARY(refdet, m) {
  m.def("has_cuda() -> bool", []() {
#ifdef REFDET_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def(
      "nms(Tensor boxes, Tensor scores, float iou_threshold, int max_keep, Tensor? groups=None, Tensor? images=None,"
      " bool inclusive=False) -> Tensor");
  m.def("has_conv3x3() -> bool", &refdet::can_multiply);
  m.def("pack_conv3x3(Tensor weight) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "match_boxes(Tensor candidates, Tensor objects)"
      " -> (Tensor best, Tensor object, Tensor most, Tensor reaches)");
  m.def(
      "masks_to_rle(Tensor probabilities, Tensor boxes, int height, int width, float threshold)"
      " -> (Tensor counts, Tensor starts, Tensor areas, Tensor tight_boxes)");
  m.def(
      "mask_coverage(Tensor counts, Tensor starts, int height, int width, Tensor boxes, Tensor objects, int size)"
      " -> Tensor");
  m.def(
      "roi_pool(Tensor x, Tensor rois, int size, float stride, int samples, bool crop, bool mean) -> Tensor");
  m.def(
      "roi_pool_backward(Tensor gradient, Tensor rois, SymInt[] shape, int size, float stride, int samples, bool crop,"
      " bool mean) -> Tensor");
}
