// Schemas of refdet's operators. Each kernel registers itself in its own file; fake implementations and plain PyTorch
// fallbacks are in refdet/ops.

#include <torch/library.h>

#include "common/simd.h"
#include "conv/gemm.h"

TORCH_LIBRARY(refdet, m) {
  m.def("has_cuda() -> bool", []() {
#ifdef REFDET_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def(
      "nms(Tensor boxes, Tensor scores, float iou_threshold, int max_keep, Tensor? groups=None, Tensor? images=None)"
      " -> Tensor");
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, int max_keep, Tensor images, int count,"
      " Tensor? groups=None) -> (Tensor kept, Tensor counts)");
  // whether this processor supports the matrix products of conv1x1 and conv3x3 (gemm.h) in float32, or with `half` in
  // float16
  m.def("has_products(bool half) -> bool",
        [](bool half) { return half ? refdet::Half::is_supported() : refdet::Single::is_supported(); });
  m.def("has_avx512() -> bool", []() { return refdet::has_avx512(); });
  m.def("has_matrix_units() -> bool", &refdet::has_matrix_units);
  m.def("pack_conv3x3(Tensor weight, bool half=False) -> (Tensor weight, Tensor scale)");
  m.def("conv3x3(Tensor x, Tensor weight, Tensor scale, Tensor bias, bool relu=False) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor x, Tensor gradient) -> Tensor");
  m.def("pack_conv1x1(Tensor weight, bool half=False) -> (Tensor weight, Tensor scale)");
  m.def(
      "conv1x1(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? shortcut=None, bool relu=False) -> Tensor");
  // out = relu(x + bias + shortcut); on GPUs only
  m.def("bias_relu(Tensor x, Tensor bias, Tensor? shortcut, Tensor(a!) out) -> ()");
  m.def("match_boxes(Tensor candidates, Tensor objects) -> (Tensor max_iou, Tensor object, Tensor is_best)");
  m.def(
      "masks_to_rle(Tensor probabilities, Tensor boxes, int height, int width, float threshold)"
      " -> (Tensor counts, Tensor starts)");
  m.def(
      "mask_coverage(Tensor counts, Tensor starts, int height, int width, Tensor boxes, Tensor objects, int size)"
      " -> Tensor");
  m.def("roi_pool(Tensor x, Tensor rois, int size, float stride, int samples, bool crop, bool mean) -> Tensor");
  m.def(
      "roi_pool_backward(Tensor gradient, Tensor rois, SymInt[] shape, int size, float stride, int samples, bool crop,"
      " bool mean) -> Tensor");
}
