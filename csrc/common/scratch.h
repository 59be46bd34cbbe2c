// Scratch memory of kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

namespace refdet {

// `count` uninitialized values from PyTorch's allocator, aligned for vectors of any size.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(at::empty({count * static_cast<int64_t>(sizeof(T))}, at::kByte)),
        data_(reinterpret_cast<T*>(bytes_.mutable_data_ptr<uint8_t>())) {}

  T* data() const { return data_; }

 private:
  at::Tensor bytes_;
  T* data_;
};

}  // namespace refdet
