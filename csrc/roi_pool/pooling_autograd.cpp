// The autograd function of RoI pooling, in C++: one in Python took longer than the kernels themselves on a small map.
// RoIs get no gradient, and the gradient of the map cannot be differentiated again.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstdint>

namespace refdet {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor pool(const at::Tensor& x, const at::Tensor& rois, int64_t size, double stride, int64_t samples, bool crop,
                bool mean) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("refdet::roi_pool", "").typed<decltype(pool)>();
  return op.call(x, rois, size, stride, samples, crop, mean);
}

at::Tensor pool_backward(const at::Tensor& gradient, const at::Tensor& rois, c10::SymIntArrayRef shape, int64_t size,
                         double stride, int64_t samples, bool crop, bool mean) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("refdet::roi_pool_backward", "")
                             .typed<decltype(pool_backward)>();
  return op.call(gradient, rois, shape, size, stride, samples, crop, mean);
}

class RoIPool : public torch::autograd::Function<RoIPool> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& rois, int64_t size,
                            double stride, int64_t samples, bool crop, bool mean) {
    context->save_for_backward({rois});
    auto& saved = context->saved_data;
    saved["shape"] = x.sym_sizes();
    saved["dtype"] = x.scalar_type();
    saved["size"] = size, saved["stride"] = stride, saved["samples"] = samples;
    saved["crop"] = crop, saved["mean"] = mean;
    const at::AutoDispatchBelowADInplaceOrView below;  // the kernels, or this function would call itself
    return pool(x, rois, size, stride, samples, crop, mean);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto& saved = context->saved_data;
    const auto shape = saved["shape"].toSymIntVector();
    const at::Tensor gradient =
        pool_backward(gradients[0], context->get_saved_variables()[0], shape, saved["size"].toInt(),
                      saved["stride"].toDouble(), saved["samples"].toInt(), saved["crop"].toBool(),
                      saved["mean"].toBool());
    return {gradient.to(saved["dtype"].toScalarType()), {}, {}, {}, {}, {}, {}};  // of x only
  }
};

at::Tensor roi_pool_autograd(const at::Tensor& x, const at::Tensor& rois, int64_t size, double stride, int64_t samples,
                             bool crop, bool mean) {
  return RoIPool::apply(x, rois, size, stride, samples, crop, mean);
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, Autograd, m) { m.impl("roi_pool", &roi_pool_autograd); }

}  // namespace refdet
