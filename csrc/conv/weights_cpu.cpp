// Packing of convolution weights into the panels that gemm.h multiplies by.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>

#include "common/simd.h"
#include "conv/weights.h"

namespace refdet {
namespace {

template <typename T>
constexpr at::ScalarType kTypeOf = c10::CppTypeToScalarType<T>::value;

template <typename Product>
void check_processor(const char* name) {
  TORCH_CHECK(Product::is_supported(), name, ": this processor has no ",
              Product::kScaled ? "AVX512-FP16, or the kernel was built by a compiler without it"
                               : "AVX2 or no fused multiply-adds");
}

// The scale factor for the weights of one output channel in `Half`: `in` weights in each of the matrices, which are
// `matrix_stride` elements apart.
float scale_of(const float* weights, int64_t matrices, int64_t matrix_stride, int64_t in) {
  double max_sum = 0;
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    for (int64_t k = 0; k < in; k += Half::kRun) {
      double sum = 0;
      for (int64_t c = k; c < std::min(k + Half::kRun, in); ++c) sum += std::abs(weights[matrix * matrix_stride + c]);
      max_sum = sum <= max_sum ? max_sum : sum;
    }
  }
  if (!(max_sum > 0) || !std::isfinite(max_sum)) return 1;
  return std::ldexp(1.0f, std::clamp(std::ilogb(Half::kMaxColumnSum / max_sum), -126, 100));
}

template <typename Product>
std::tuple<at::Tensor, at::Tensor> pack_as(const at::Tensor& weights) {
  using B = typename Product::B;
  constexpr int64_t kPanel = Product::kPanel;
  const int64_t matrices = weights.size(0), out = weights.size(1), in = weights.size(2);
  at::Tensor packed = at::empty({matrices, out / kPanel, in, kPanel}, weights.options().dtype(kTypeOf<B>));
  at::Tensor scale = at::empty({out}, at::kFloat);
  const float* from = weights.const_data_ptr<float>();
  B* to = packed.mutable_data_ptr<B>();
  float* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, out, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const float factor = Product::kScaled ? scale_of(from + o * in, matrices, out * in, in) : 1;
      scales[o] = 1 / factor;
      for (int64_t matrix = 0; matrix < matrices; ++matrix) {
        const float* values = from + (matrix * out + o) * in;
        B* panel = to + (matrix * out + o / kPanel * kPanel) * in + o % kPanel;
        for (int64_t c = 0; c < in; ++c) panel[c * kPanel] = static_cast<B>(values[c] * factor);
      }
    }
  });
  return {packed, scale};
}

}  // namespace

void check_weight(const char* name, const at::Tensor& weight, bool half) {
  half ? check_processor<Half>(name) : check_processor<Single>(name);
  const int64_t outputs = half ? Half::kPanel : Single::kPanel;
  TORCH_CHECK(weight.size(0) % outputs == 0 && weight.size(1) % kLanes == 0 && weight.size(0) > 0 && weight.size(1) > 0,
              name, ": output channels must be a multiple of ", outputs, ", inputs of ", kLanes, ", got ",
              weight.sizes());
  TORCH_CHECK(weight.scalar_type() == at::kFloat, name, ": the weight must be float32, got ", weight.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& weights, bool half) {
  return half ? pack_as<Half>(weights) : pack_as<Single>(weights);
}

template <typename Product>
int64_t check_packed(const char* name, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                     const at::Tensor& bias, int64_t matrices) {
  using Map = typename Product::Map;
  using B = typename Product::B;
  check_processor<Product>(name);
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == matrices && weight.size(3) == Product::kPanel &&
                  weight.scalar_type() == kTypeOf<B> && weight.is_contiguous(),
              name, ": the weight is not one of pack_", name, ", got ", weight.sizes());
  const int64_t channels = weight.size(1) * Product::kPanel;
  TORCH_CHECK(x.dim() == 4 && x.size(1) == weight.size(2), name, ": the map must be (N, ", weight.size(2),
              ", H, W), got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == kTypeOf<Map>, name, ": the map must be ", Product::kScaled ? "bfloat16" : "float32",
              ", got ", x.scalar_type());
  for (const at::Tensor& values : {scale, bias}) {
    TORCH_CHECK(values.sizes() == at::IntArrayRef({channels}) && values.scalar_type() == at::kFloat, name, ": the ",
                values.is_same(bias) ? "bias" : "scale", " must be float32 (", channels, "), got ", values.sizes());
  }
  return channels;
}

template int64_t check_packed<Single>(const char*, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                      const at::Tensor&, int64_t);
template int64_t check_packed<Half>(const char*, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                    const at::Tensor&, int64_t);

}  // namespace refdet
