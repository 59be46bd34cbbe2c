// RoI pooling on CUDA, forward and backward: the same sums as csrc/roi_pool/pooling_cpu.cpp, with the same find_taps.
//
// A tap is a position that a cell reads along one axis, with its weight; the weights of both axes are multiplied.
// tap_kernel writes the taps of each RoI, axis and cell. pool_kernel sums over the taps of each cell, mean_kernel over
// those of the whole RoI. group_kernel (roi_groups.cuh) lists the RoIs of each image in order, and pool_backward_kernel
// sums, for each position of the map, over the RoIs of its image in that order and their cells that read it. Sums and
// means are float32, without atomics, so results are deterministic. A RoI with an image index out of range gets NaN and
// no gradient, as raising an error would need a synchronization.
//
// Cost: the forward pass writes each cell once and reads each position from global memory once, for further cells from
// the cache. The backward pass writes each position once, and reads a cell once per position of its taps, mostly from
// the cache; each warp also scans the windows of the RoIs of its own image only, 32 at a time.
//
// Speed: if alignment allows, a warp reads and writes 512 bytes of a channels_last position at once, 16 per thread. A
// block processes all cells of a RoI for one slice of channels, so that the positions they share stay in the L1 cache.
// Taps are computed once for all channels. The backward pass needs no zeroed map or float32 copy: it sums in registers.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "roi_pool/pooling.h"
#include "roi_pool/roi_groups.cuh"

namespace refdet {
namespace {

// ---- device code

constexpr int kWarps = 8, kThreads = kWarp * kWarps;

// The taps of all RoIs: a list for each RoI, axis and cell. List n = (roi * 2 + axis) * cells + cell, where axis 0 is
// x, begins at element n * capacity of `position` and `weight`, and has count[n] taps.
struct Lists {
  int32_t *position, *count;
  float* weight;
  int4* window;    // first and last column, first and last row that each RoI reads; first > last if it reads none
  int64_t* image;  // image index of each RoI, or -1 if it is out of range
  int64_t capacity, cells;  // room for taps in a list; cells on a side of a RoI, 1 for the mean
};

// A map or its gradient: sizes, and strides of images, rows and columns in elements. The stride of channels is 1.
struct Shape {
  int64_t batch, channels, height, width, image_stride, row_stride, column_stride;
};

template <typename T, int vec_size>
struct alignas(sizeof(T) * vec_size) Pack {
  T value[vec_size];  // channels that a thread reads or writes at once
};

// Fills the lists, the window and the image of one RoI per block. A RoI is (image index, x1, y1, x2, y2).
__global__ void tap_kernel(const float* rois, Sampling sampling, Shape map, Lists lists) {
  __shared__ int first[2], last[2];
  const int64_t roi = blockIdx.x;
  const float* box = rois + 5 * roi;
  if (threadIdx.x < 2) first[threadIdx.x] = INT_MAX, last[threadIdx.x] = -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 2 * lists.cells; i += blockDim.x) {
    const int axis = i >= lists.cells;
    const int64_t list = roi * 2 * lists.cells + i;
    Taps taps{lists.position + list * lists.capacity, lists.weight + list * lists.capacity};
    find_taps(sampling, box[1 + axis], box[3 + axis], axis ? i - lists.cells : i, axis ? map.height : map.width, taps);
    lists.count[list] = taps.count;
    if (taps.count > 0) {
      atomicMin(&first[axis], taps.position[0]);
      atomicMax(&last[axis], taps.position[taps.count - 1]);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    lists.window[roi] = make_int4(first[0], last[0], first[1], last[1]);
    const float image = box[0];
    lists.image[roi] = image >= 0 && image < static_cast<float>(map.batch) ? static_cast<int64_t>(image) : -1;
  }
}

// Adds the weighted values of the positions that one cell reads to `sum`. `x` and `y` are the numbers of the cell's
// lists; of the rows in list y, only those with index begin, begin + step and so on are added.
template <typename T, int vec_size>
__device__ void add_taps(const T* image, const Shape& map, const Lists& lists, int64_t x, int64_t y, int begin,
                         int step, float* sum) {
  const int32_t *columns = lists.position + x * lists.capacity, *rows = lists.position + y * lists.capacity;
  const float *column_weight = lists.weight + x * lists.capacity, *row_weight = lists.weight + y * lists.capacity;
  const int count_x = lists.count[x], count_y = lists.count[y];
  for (int i = begin; i < count_y; i += step) {
    const T* map_row = image + rows[i] * map.row_stride;
#pragma unroll 4
    for (int j = 0; j < count_x; ++j) {
      const float weight = row_weight[i] * column_weight[j];
      const auto values = *reinterpret_cast<const Pack<T, vec_size>*>(map_row + columns[j] * map.column_stride);
      for (int v = 0; v < vec_size; ++v) sum[v] += weight * static_cast<float>(values.value[v]);
    }
  }
}

template <typename T, int vec_size>
__device__ void write(T* to, const float* sum) {
  Pack<T, vec_size> values;
  for (int v = 0; v < vec_size; ++v) values.value[v] = static_cast<T>(sum[v]);
  *reinterpret_cast<Pack<T, vec_size>*>(to) = values;
}

// A block processes one RoI for one slice of channels, and each of its warps every kWarps-th cell.
template <typename T, int vec_size>
__global__ void pool_kernel(const T* data, Shape map, Lists lists, T* out) {
  const int64_t roi = blockIdx.x, channel = (blockIdx.y * int64_t{kWarp} + threadIdx.x % kWarp) * vec_size;
  if (channel >= map.channels) return;
  const int64_t cells = lists.cells, first_list = roi * 2 * cells, image = lists.image[roi];
  for (int64_t cell = threadIdx.x / kWarp; cell < cells * cells; cell += kWarps) {
    float sum[vec_size] = {};
    if (image < 0) {
      for (float& value : sum) value = NAN;
    } else {
      add_taps<T, vec_size>(data + image * map.image_stride + channel, map, lists, first_list + cell % cells,
                            first_list + cells + cell / cells, 0, 1, sum);
    }
    write<T, vec_size>(out + (roi * cells * cells + cell) * map.channels + channel, sum);
  }
}

// The same for the mean over all cells, in float32, from one list per axis: each warp sums every kWarps-th row.
template <typename T, int vec_size>
__global__ void mean_kernel(const T* data, Shape map, Lists lists, float* out) {
  __shared__ float parts[kWarps][kWarp * vec_size];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t roi = blockIdx.x, channel = (blockIdx.y * int64_t{kWarp} + lane) * vec_size, image = lists.image[roi];
  float sum[vec_size] = {};
  if (channel < map.channels && image >= 0) {
    add_taps<T, vec_size>(data + image * map.image_stride + channel, map, lists, roi * 2, roi * 2 + 1, warp, kWarps,
                          sum);
  }
  for (int v = 0; v < vec_size; ++v) parts[warp][lane * vec_size + v] = sum[v];
  __syncthreads();
  if (warp > 0 || channel >= map.channels) return;
  for (int v = 0; v < vec_size; ++v) {
    for (int other = 1; other < kWarps; ++other) sum[v] += parts[other][lane * vec_size + v];
    if (image < 0) sum[v] = NAN;
  }
  write<float, vec_size>(out + roi * map.channels + channel, sum);
}

// The weight of position `wanted` in a list, or 0 if it is not there. As the positions of a list ascend, its index is
// at most `wanted` minus the first position.
__device__ float weight_at(const Lists& lists, int64_t list, int32_t wanted) {
  const int32_t count = lists.count[list], *position = lists.position + list * lists.capacity;
  if (count == 0 || wanted < position[0]) return 0;
  int32_t index = min(wanted - position[0], count - 1);
  while (position[index] > wanted) --index;
  return position[index] == wanted ? lists.weight[list * lists.capacity + index] : 0;
}

// A warp computes the gradient of one position of the map, for one slice of channels, from `pooled`, the gradient of
// the cells. In a ballot each lane tests one RoI, row or column of cells; the warp then goes through the set bits.
template <typename T, int vec_size>
__global__ void pool_backward_kernel(const T* pooled, Shape map, Lists lists, Groups groups, T* out) {
  const int lane = threadIdx.x % kWarp;
  const int64_t position = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (position >= map.batch * map.height * map.width) return;  // all lanes of the warp
  const int64_t channel = (blockIdx.y * int64_t{kWarp} + lane) * vec_size, image = position / (map.height * map.width);
  const auto x = static_cast<int32_t>(position % map.width),
             y = static_cast<int32_t>(position / map.width % map.height);
  const bool in_range = channel < map.channels;
  const int64_t cells = lists.cells;
  float sum[vec_size] = {};
  const int32_t end = groups.first[image + 1];
  for (int32_t start = groups.first[image]; start < end; start += kWarp) {
    bool reads = false;
    int32_t candidate = 0;
    if (start + lane < end) {
      candidate = groups.member[start + lane];
      const int4 window = lists.window[candidate];
      reads = window.x <= x && x <= window.y && window.z <= y && y <= window.w;
    }
    for (unsigned remaining = __ballot_sync(kAllLanes, reads); remaining; remaining &= remaining - 1) {
      const int64_t roi = __shfl_sync(kAllLanes, candidate, __ffs(remaining) - 1), first_list = roi * 2 * cells;
      for (int64_t row = 0; row < cells; row += kWarp) {
        const float row_weight = row + lane < cells ? weight_at(lists, first_list + cells + row + lane, y) : 0;
        const unsigned rows = __ballot_sync(kAllLanes, row_weight != 0);
        for (int64_t column = 0; rows && column < cells; column += kWarp) {
          const float column_weight = column + lane < cells ? weight_at(lists, first_list + column + lane, x) : 0;
          const unsigned columns = __ballot_sync(kAllLanes, column_weight != 0);
          for (unsigned r = rows; r; r &= r - 1) {
            const int at_row = __ffs(r) - 1;
            for (unsigned c = columns; c; c &= c - 1) {
              const int at_column = __ffs(c) - 1;
              const float weight =
                  __shfl_sync(kAllLanes, row_weight, at_row) * __shfl_sync(kAllLanes, column_weight, at_column);
              const int64_t cell = (roi * cells + row + at_row) * cells + column + at_column;
              if (!in_range) continue;  // not before, as every lane takes part in ballots and shuffles
              const auto values = *reinterpret_cast<const Pack<T, vec_size>*>(pooled + cell * map.channels + channel);
              for (int v = 0; v < vec_size; ++v) sum[v] += weight * static_cast<float>(values.value[v]);
            }
          }
        }
      }
    }
  }
  if (in_range) write<T, vec_size>(out + position * map.channels + channel, sum);
}

// ---- host code

// Computes the lists of all RoIs on the device, and holds their memory: a single tensor, as each allocation costs the
// host microseconds.
struct Tables {
  at::Tensor memory;
  Lists lists;

  Tables(const at::Tensor& rois, const Sampling& sampling, const Shape& map, cudaStream_t stream) {
    const int64_t count = rois.size(0), cells = sampling.cells(),
                  capacity = sampling.capacity(std::max(map.height, map.width));
    const int64_t list_count = count * 2 * cells;
    static_assert(sizeof(int4) == 4 * sizeof(int32_t) && sizeof(int64_t) == 2 * sizeof(int32_t));
    memory = at::empty({count * (4 + 2) + list_count * (2 * capacity + 1)}, rois.options().dtype(at::kInt));
    int32_t* const windows = memory.mutable_data_ptr<int32_t>();  // arrays in descending order of alignment
    int32_t *const images = windows + 4 * count, *const positions = images + 2 * count;
    int32_t *const weights = positions + list_count * capacity, *const counts = weights + list_count * capacity;
    lists = {positions,
             counts,
             reinterpret_cast<float*>(weights),
             reinterpret_cast<int4*>(windows),
             reinterpret_cast<int64_t*>(images),
             capacity,
             cells};
    const int threads = static_cast<int>(std::min<int64_t>(kThreads, (2 * cells + kWarp - 1) / kWarp * kWarp));
    tap_kernel<<<static_cast<unsigned>(count), threads, 0, stream>>>(rois.const_data_ptr<float>(), sampling, map,
                                                                     lists);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// Whether the channels of every position can be read as packs of 16 bytes: `vec_size` elements, aligned to 16 bytes.
bool fits_packs(const at::Tensor& map, int64_t vec_size) {
  return map.size(1) % vec_size == 0 && map.stride(0) % vec_size == 0 && map.stride(2) % vec_size == 0 &&
         map.stride(3) % vec_size == 0 && reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16 == 0;
}

// Number of blocks for `work` items, with `each` items per block; raises an error if the grid would be too large.
unsigned blocks(int64_t work, int64_t each) {
  const int64_t count = (work + each - 1) / each;
  TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "RoI pooling: ", work, " exceeds the limit of one call");
  return static_cast<unsigned>(count);
}

template <typename T, int vec_size>
void pool(const at::Tensor& x, const Shape& map, const Tables& tables, bool mean, at::Tensor& out,
          cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(out.size(0)), blocks(map.channels, kWarp * vec_size));
  const T* data = x.const_data_ptr<T>();
  if (mean) {
    mean_kernel<T, vec_size><<<grid, kThreads, 0, stream>>>(data, map, tables.lists, out.mutable_data_ptr<float>());
  } else {
    pool_kernel<T, vec_size><<<grid, kThreads, 0, stream>>>(data, map, tables.lists, out.mutable_data_ptr<T>());
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void pool(const at::Tensor& x, const Shape& map, const Tables& tables, bool mean, at::Tensor& out,
          cudaStream_t stream) {
  constexpr int kVecSize = 16 / sizeof(T);
  if (fits_packs(x, kVecSize)) {
    pool<T, kVecSize>(x, map, tables, mean, out, stream);
  } else {
    pool<T, 1>(x, map, tables, mean, out, stream);
  }
}

at::Tensor roi_pool_cuda(const at::Tensor& x, const at::Tensor& rois, int64_t size, double stride, int64_t samples,
                         bool crop, bool mean) {
  const Sampling sampling = check_pooling(x.sizes(), x, rois, size, stride, samples, crop, mean);
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor data = with_channels_last(x), boxes = rois.contiguous();
  const auto type = mean ? at::kFloat : x.scalar_type();
  at::Tensor out = at::empty({rois.size(0), x.size(1), sampling.cells(), sampling.cells()}, x.options().dtype(type),
                             at::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  blocks(rois.size(0), 1);  // only to check the limit
  const Shape map{x.size(0), x.size(1), x.size(2), x.size(3), data.stride(0), data.stride(2), data.stride(3)};
  const Tables tables(boxes, sampling, map, stream);
  if (x.scalar_type() == at::kFloat) {
    pool<float>(data, map, tables, mean, out, stream);
  } else {
    pool<at::BFloat16>(data, map, tables, mean, out, stream);
  }
  return out;
}

template <typename T, int vec_size>
void pool_backward(const at::Tensor& pooled, const Shape& map, const Tables& tables, at::Tensor& out,
                   cudaStream_t stream) {
  const at::Tensor members = at::empty({pooled.size(0) + map.batch + 1}, tables.memory.options());
  const Groups groups{members.mutable_data_ptr<int32_t>(), members.mutable_data_ptr<int32_t>() + pooled.size(0)};
  group_kernel<<<blocks(map.batch, 1), kWarp, 0, stream>>>(tables.lists.image, pooled.size(0), groups);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const dim3 grid(blocks(map.batch * map.height * map.width, kWarps), blocks(map.channels, kWarp * vec_size));
  pool_backward_kernel<T, vec_size>
      <<<grid, kThreads, 0, stream>>>(pooled.const_data_ptr<T>(), map, tables.lists, groups, out.mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void pool_backward(const at::Tensor& pooled, const Shape& map, const Tables& tables, at::Tensor& out,
                   cudaStream_t stream) {
  constexpr int kVecSize = 16 / sizeof(T);
  if (map.channels % kVecSize == 0 && reinterpret_cast<uintptr_t>(pooled.const_data_ptr()) % 16 == 0) {
    pool_backward<T, kVecSize>(pooled, map, tables, out, stream);
  } else {
    pool_backward<T, 1>(pooled, map, tables, out, stream);
  }
}

at::Tensor roi_pool_backward_cuda(const at::Tensor& gradient, const at::Tensor& rois, at::IntArrayRef shape,
                                  int64_t size, double stride, int64_t samples, bool crop, bool mean) {
  const Sampling sampling = check_pooling(shape, gradient, rois, size, stride, samples, crop, mean);
  check_pooled(gradient, rois, shape, sampling);
  const c10::cuda::CUDAGuard guard(gradient.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor pooled = gradient.contiguous(at::MemoryFormat::ChannelsLast), boxes = rois.contiguous();
  at::Tensor out = at::empty({shape[0], shape[2], shape[3], shape[1]}, gradient.options()).permute({0, 3, 1, 2});
  if (out.numel() == 0) return out;
  if (rois.size(0) == 0) return out.zero_();
  blocks(rois.size(0), 1);  // only to check the limit
  const Shape map{shape[0], shape[1], shape[2], shape[3], out.stride(0), out.stride(2), out.stride(3)};
  const Tables tables(boxes, sampling, map, stream);
  if (gradient.scalar_type() == at::kFloat) {
    pool_backward<float>(pooled, map, tables, out, stream);
  } else {
    pool_backward<at::BFloat16>(pooled, map, tables, out, stream);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) {
  m.impl("roi_pool", &roi_pool_cuda);
  m.impl("roi_pool_backward", &roi_pool_backward_cuda);
}

}  // namespace refdet
