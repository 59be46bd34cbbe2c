// The kernel of bias_relu_cuda.cu. It does not depend on PyTorch, so that tests can run it thread by thread on a CPU
// (tests/ops/cuda_threads.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace refdet {

constexpr int64_t kThreadsPerBlock = 256;
constexpr int64_t kMaxBlocks = 4096;  // enough for every GPU; threads loop over the rest

// Blocks for rows * columns vectors, with a number of threads that is a multiple of `columns`.
inline int64_t blocks_for(int64_t rows, int64_t columns) {
  // the smallest number of blocks whose threads are a multiple of `columns`
  const int64_t unit = columns / std::gcd(columns, kThreadsPerBlock);
  const int64_t needed = (rows * columns + kThreadsPerBlock * unit - 1) / (kThreadsPerBlock * unit);
  return unit * std::min(needed, std::max<int64_t>(kMaxBlocks / unit, 1));
}

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

// out = relu(x + bias + shortcut) of `rows` positions with columns * kVector channels each; NaN stays NaN. The channels
// of a position are next to each other, and the positions of each tensor are `..._stride` elements apart.
//
// Every thread has the same channels at all of its positions, so the number of threads must be a multiple of `columns`.
// It reads each element before writing it, so `out` may be x.
template <typename T, int kVector>
__global__ void bias_relu_kernel(const T* x, int64_t x_stride, const float* bias, const T* shortcut,
                                 int64_t shortcut_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  using Channels = Vector<T, kVector>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x / columns;
  const int64_t channel = thread % columns * kVector;
  float own_bias[kVector];
  for (int i = 0; i < kVector; ++i) own_bias[i] = bias[channel + i];
  for (int64_t row = thread / columns; row < rows; row += step) {
    Channels sum = *reinterpret_cast<const Channels*>(x + row * x_stride + channel);
    Channels added{};
    if (shortcut) added = *reinterpret_cast<const Channels*>(shortcut + row * shortcut_stride + channel);
    for (int i = 0; i < kVector; ++i) {
      float value = static_cast<float>(sum.values[i]) + own_bias[i];
      if (shortcut) value += static_cast<float>(added.values[i]);
      sum.values[i] = static_cast<T>(value > 0.0f || value != value ? value : 0.0f);
    }
    *reinterpret_cast<Channels*>(out + row * out_stride + channel) = sum;
  }
}

}  // namespace refdet
