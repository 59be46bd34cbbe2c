// Packing of convolution weights for gemm.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "conv/gemm.h"

namespace refdet {

// Checks that a weight (K, C, ...) is float32, that its channels can be packed, and that the processor is supported.
void check_weight(const char* name, const at::Tensor& weight, bool half);

// P weight matrices (P, K, C) float32 -> panels (P, K / panel, C, panel), float32 or float16, and float32 factors (K)
// of the sums of each output channel: 1, or a power of two.
std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& weights, bool half);

// Checks that a map, weights packed with P = `matrices`, and a bias (K) match; returns K.
template <typename Product>
int64_t check_packed(const char* name, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                     const at::Tensor& bias, int64_t matrices);

}  // namespace refdet
