// Transforms weights to the 36 points, and packs them for winograd_cpu.cpp.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "conv/weights.h"
#include "conv/winograd.h"

namespace refdet {
namespace {

// Transformed weights (36, K, C) of weights (K, C, 3, 3), not yet packed.
at::Tensor weights_at_points(const at::Tensor& weight) {
  const at::Tensor flat = weight.contiguous();
  const int64_t out = flat.size(0), in = flat.size(1);
  at::Tensor transformed = at::empty({kPoints * kPoints, out, in}, flat.options());
  const float* from = flat.const_data_ptr<float>();
  float* to = transformed.mutable_data_ptr<float>();
  constexpr auto kWeight = weight_matrix();
  at::parallel_for(0, out * in, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* taps = from + i * kTaps * kTaps;
      float* at = to + i;
      for (int down = 0; down < kPoints; ++down) {
        for (int across = 0; across < kPoints; ++across, at += out * in) {
          double sum = 0;
          for (int tap = 0; tap < kTaps * kTaps; ++tap) {
            sum += kWeight[down][tap / kTaps] * kWeight[across][tap % kTaps] * taps[tap];
          }
          *at = static_cast<float>(sum);
        }
      }
    }
  });
  return transformed;
}

std::tuple<at::Tensor, at::Tensor> pack_conv3x3_cpu(const at::Tensor& weight, bool half) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kTaps && weight.size(3) == kTaps,
              "conv3x3: the weight must be (K, C, 3, 3), got ", weight.sizes());
  check_weight("conv3x3", weight, half);
  return pack(weights_at_points(weight), half);
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("pack_conv3x3", &pack_conv3x3_cpu); }

}  // namespace refdet
