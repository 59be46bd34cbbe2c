// Weights of convolutions as gemm.h multiplies with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "conv/gemm.h"

namespace refdet {

// Raises unless a weight (K, C, ...) is float32, its channels are such as can be packed, and the processor can use it.
void check_weight(const char* name, const at::Tensor& weight, bool half);

// Weights (P, K, C) float32, of which each of P is a matrix of its own -> panels (P, K / panel, C, panel), float32 or
// float16, and what the sums of each output channel are to be multiplied by (K), float32: 1, or a power of two.
std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& weights, bool half);

// Raises unless a map, what `pack` gave for P = `matrices`, and a bias (K) fit each other; returns K.
template <typename Product>
int64_t check_packed(const char* name, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                     const at::Tensor& bias, int64_t matrices);

}  // namespace refdet
