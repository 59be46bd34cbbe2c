// The epilogue of a convolution in one pass over its output: bias, shortcut and ReLU.
//
// Separate passes move up to seven times the bytes of the output: they read and write it three times, and read the
// shortcut. This kernel moves three times: it reads and writes the output, and reads the shortcut. Sums are float32, in the order of the separate passes, so that float32 results are identical
// to theirs, and other types are rounded once.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>

#include "epilogue/bias_relu.cuh"

namespace refdet {
namespace {

constexpr int64_t kBytes = 16;  // read by a thread at a time

// Elements from one position (n, h, w) to the next. Raises an error unless positions are evenly spaced and channels
// contiguous.
int64_t position_stride(const at::Tensor& x, const char* name) {
  const int64_t height = x.size(2), width = x.size(3);
  // the stride of a dimension of size 1 is meaningless
  const int64_t stride = width > 1 ? x.stride(3) : height > 1 ? x.stride(2) : x.size(0) > 1 ? x.stride(0) : x.size(1);
  TORCH_CHECK((x.size(1) == 1 || x.stride(1) == 1) && (height == 1 || x.stride(2) == width * stride) &&
                  (x.size(0) == 1 || x.stride(0) == height * width * stride) && stride >= x.size(1),
              "bias_relu: ", name, " must be channels_last, got strides ", x.strides(), " of ", x.sizes());
  return stride;
}

template <typename T>
void launch(const at::Tensor& x, const at::Tensor& bias, const std::optional<at::Tensor>& shortcut, at::Tensor& out) {
  const int64_t channels = x.size(1), rows = x.size(0) * x.size(2) * x.size(3);
  const int64_t x_stride = position_stride(x, "x"), out_stride = position_stride(out, "out");
  const int64_t shortcut_stride = shortcut ? position_stride(*shortcut, "shortcut") : 0;
  const T* x_data = x.const_data_ptr<T>();
  const T* shortcut_data = shortcut ? shortcut->const_data_ptr<T>() : nullptr;
  T* out_data = out.mutable_data_ptr<T>();
  constexpr int kVector = kBytes / sizeof(T);
  const auto aligned = [](const void* at, int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(at) % kBytes == 0 && stride % kVector == 0;
  };
  const bool vectorized = channels % kVector == 0 && aligned(x_data, x_stride) && aligned(out_data, out_stride) &&
                          aligned(shortcut_data, shortcut_stride);
  const int64_t columns = vectorized ? channels / kVector : channels;
  const auto blocks = static_cast<unsigned>(blocks_for(rows, columns));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const float* bias_data = bias.const_data_ptr<float>();
  if (vectorized) {
    bias_relu_kernel<T, kVector><<<blocks, kThreadsPerBlock, 0, stream>>>(
        x_data, x_stride, bias_data, shortcut_data, shortcut_stride, out_data, out_stride, rows, columns);
  } else {
    bias_relu_kernel<T, 1><<<blocks, kThreadsPerBlock, 0, stream>>>(x_data, x_stride, bias_data, shortcut_data,
                                                             shortcut_stride, out_data, out_stride, rows, columns);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void bias_relu_cuda(const at::Tensor& x, const at::Tensor& bias, const std::optional<at::Tensor>& shortcut,
                    at::Tensor& out) {
  TORCH_CHECK(x.dim() == 4 && out.sizes() == x.sizes() && (!shortcut || shortcut->sizes() == x.sizes()),
              "bias_relu: x must be (N, C, H, W), and shortcut and out like it, got ", x.sizes(), ", ",
              shortcut ? shortcut->sizes() : x.sizes(), " and ", out.sizes());
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.size(1) && bias.scalar_type() == at::kFloat && bias.is_contiguous(),
              "bias_relu: bias must be (", x.size(1), ",) float32, got ", bias.sizes(), " ", bias.scalar_type());
  TORCH_CHECK(out.scalar_type() == x.scalar_type() && (!shortcut || shortcut->scalar_type() == x.scalar_type()),
              "bias_relu: shortcut and out must be ", x.scalar_type(), " like x");
  TORCH_CHECK(
      bias.device() == x.device() && out.device() == x.device() && (!shortcut || shortcut->device() == x.device()),
      "bias_relu: all tensors must be on ", x.device());
  if (x.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  switch (x.scalar_type()) {
    case at::kFloat:
      return launch<float>(x, bias, shortcut, out);
    case at::kBFloat16:
      return launch<c10::BFloat16>(x, bias, shortcut, out);
    case at::kHalf:
      return launch<c10::Half>(x, bias, shortcut, out);
    default:
      TORCH_CHECK(false, "bias_relu: x must be float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) { m.impl("bias_relu", &bias_relu_cuda); }

}  // namespace refdet
