// The operators of refdet as PyTorch sees them. The kernels register themselves, each in its own file, and the
// fake implementations and plain fallbacks stand in refdet/ops beside the functions people call.

#include <torch/library.h>

TORCH_LIBRARY(refdet, m) {
  m.def("has_cuda() -> bool", []() {
#ifdef REFDET_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold, int max_keep) -> Tensor");
}
