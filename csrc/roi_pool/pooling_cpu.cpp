// RoI pooling on the CPU, forward and backward: RoIAlign, the reference's crop, and the mean of either over its cells.
//
// A cell is the sum of w_y w_x map[y, x] over rows y and columns x, with the weights of find_taps in pooling.h. The
// backward pass sums w_y w_x gradient[cell] for each position of the map, over the RoIs in order and their cells. Maps
// are float32 or bfloat16; sums and means are float32, with each operation rounded separately.
//
// Cost: C multiply-adds per distinct position that a cell reads; the 4 samples of a cell have 16 corners, but mostly
// only 6 to 9 distinct ones. The mean reads each position of the RoI once, and stores no cells.
//
// Speed: in channels_last the C channels of a position are contiguous, so all loops are SIMD along C, with the sums of
// up to 128 channels in registers; the forward pass takes 128 channels of a RoI at a time, so that what its cells share
// stays in the L1 cache. The backward pass iterates over positions and the cells that read them: it adds to each
// position once per RoI, not once per cell. The forward pass distributes RoIs to threads, the backward pass images and
// channels, so that each sum has the same order with any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "common/simd.h"
#include "roi_pool/pooling.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace refdet {
namespace {

// A map or its gradient, with the strides of images, rows and columns; channels are contiguous.
template <typename T>
struct Map {
  T* data;
  int64_t channels, height, width, image_stride, row_stride, column_stride;

  Map(const at::Tensor& x, T* data)
      : data(data),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        image_stride(x.stride(0)),
        row_stride(x.stride(2)),
        column_stride(x.stride(3)) {}
};

// The taps of all cells along an axis; those of cell i are the elements [i * capacity, i * capacity + count[i]).
struct Axis {
  int64_t capacity = 0;
  std::vector<int32_t> position, count;
  std::vector<float> weight;

  void fill(const Sampling& sampling, float low, float high, int64_t limit) {
    capacity = sampling.capacity(limit);
    position.resize(sampling.cells() * capacity), weight.resize(sampling.cells() * capacity),
        count.resize(sampling.cells());
    for (int64_t cell = 0; cell < sampling.cells(); ++cell) {
      Taps taps{position.data() + cell * capacity, weight.data() + cell * capacity};
      find_taps(sampling, low, high, cell, limit, taps);
      count[cell] = taps.count;
    }
  }
};

// The inverse of an Axis: the cells that read a position, and with which weights. Those of position[i] are the elements
// [start[i], start[i + 1]) of `cell` and `weight`.
struct Readers {
  std::vector<int32_t> position, start, cell;
  std::vector<float> weight;

  explicit Readers(const Axis& axis) {
    struct Tap {
      int32_t position, cell;
      float weight;
    };
    std::vector<Tap> taps;
    for (size_t i = 0; i < axis.count.size(); ++i) {
      for (int64_t j = i * axis.capacity, end = j + axis.count[i]; j < end; ++j) {
        taps.push_back({axis.position[j], static_cast<int32_t>(i), axis.weight[j]});
      }
    }
    std::sort(taps.begin(), taps.end(), [](const Tap& a, const Tap& b) {
      return a.position != b.position ? a.position < b.position : a.cell < b.cell;
    });
    for (const Tap& tap : taps) {
      if (position.empty() || position.back() != tap.position) {
        position.push_back(tap.position);
        start.push_back(static_cast<int32_t>(cell.size()));
      }
      cell.push_back(tap.cell), weight.push_back(tap.weight);
    }
    start.push_back(static_cast<int32_t>(cell.size()));
  }
};

// Pools all cells of one RoI, row by row, for `vectors` vectors of channels; `out` has map.channels values per cell.
template <typename Lane, int vectors, typename T, typename Out>
REFDET_INLINE void pool_cells(const T* image, const Map<const T>& map, const Axis& x, const Axis& y, Out* out) {
  constexpr int64_t kStep = sizeof(Lane) / sizeof(float);
  for (size_t row = 0; row < y.count.size(); ++row) {
    for (size_t column = 0; column < x.count.size(); ++column, out += map.channels) {
      Lane sum[vectors] = {};
      for (int64_t i = row * y.capacity, end_y = i + y.count[row]; i < end_y; ++i) {
        const T* map_row = image + y.position[i] * map.row_stride;
        for (int64_t j = column * x.capacity, end_x = j + x.count[column]; j < end_x; ++j) {
          const float weight = y.weight[i] * x.weight[j];
          const T* from = map_row + x.position[j] * map.column_stride;
          for (int v = 0; v < vectors; ++v) {
            Lane values;
            load(from + v * kStep, values);
            sum[v] += weight * values;
          }
        }
      }
      for (int v = 0; v < vectors; ++v) store(sum[v], out + v * kStep);
    }
  }
}

// The same for all channels, in as few vectors as possible.
template <typename T, typename Out>
REFDET_INLINE void pool_roi(const T* image, const Map<const T>& map, const Axis& x, const Axis& y, Out* out) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= map.channels; c += 8 * kLanes) pool_cells<Floats, 8>(image + c, map, x, y, out + c);
  for (; c + 4 * kLanes <= map.channels; c += 4 * kLanes) pool_cells<Floats, 4>(image + c, map, x, y, out + c);
  for (; c + kLanes <= map.channels; c += kLanes) pool_cells<Floats, 1>(image + c, map, x, y, out + c);
  for (; c < map.channels; ++c) pool_cells<float, 1>(image + c, map, x, y, out + c);
}

REFDET_SIMD void pool_one(const float* image, const Map<const float>& map, const Axis& x, const Axis& y, float* out) {
  pool_roi(image, map, x, y, out);
}

REFDET_SIMD void pool_one(const at::BFloat16* image, const Map<const at::BFloat16>& map, const Axis& x, const Axis& y,
                          at::BFloat16* out) {
  pool_roi(image, map, x, y, out);
}

REFDET_SIMD void pool_one(const at::BFloat16* image, const Map<const at::BFloat16>& map, const Axis& x, const Axis& y,
                          float* out) {
  pool_roi(image, map, x, y, out);
}

// Adds the gradient of the cells of one RoI, `cells` on a side, to the gradient of an image, for `vectors` vectors of
// channels.
template <typename Lane, int vectors, typename T>
REFDET_INLINE void add_cells(const T* pooled, int64_t cells, const Readers& x, const Readers& y, const Map<float>& map,
                             float* image) {
  constexpr int64_t kStep = sizeof(Lane) / sizeof(float);
  for (size_t i = 0; i < y.position.size(); ++i) {
    for (size_t j = 0; j < x.position.size(); ++j) {
      Lane sum[vectors] = {};
      for (int32_t r = y.start[i]; r < y.start[i + 1]; ++r) {
        for (int32_t c = x.start[j]; c < x.start[j + 1]; ++c) {
          const float weight = y.weight[r] * x.weight[c];
          const T* from = pooled + (y.cell[r] * cells + x.cell[c]) * map.channels;
          for (int v = 0; v < vectors; ++v) {
            Lane values;
            load(from + v * kStep, values);
            sum[v] += weight * values;
          }
        }
      }
      float* to = image + y.position[i] * map.row_stride + x.position[j] * map.column_stride;
      for (int v = 0; v < vectors; ++v) {
        Lane values;
        load(to + v * kStep, values);
        store(values + sum[v], to + v * kStep);
      }
    }
  }
}

// Adds the gradient of the RoIs of one image to the gradient of the image, for the channels [begin, end). `pooled` has
// the gradient of the cells of all RoIs.
template <typename T>
REFDET_INLINE void add_rois(const T* pooled, int64_t cells, const std::vector<int64_t>& rois,
                            const std::vector<Readers>& x, const std::vector<Readers>& y, const Map<float>& map,
                            float* image, int64_t begin, int64_t end) {
  for (const int64_t roi : rois) {
    const T* roi_gradient = pooled + roi * cells * cells * map.channels;
    const Readers &columns = x[roi], &rows = y[roi];
    int64_t c = begin;
    for (; c + 8 * kLanes <= end; c += 8 * kLanes)
      add_cells<Floats, 8>(roi_gradient + c, cells, columns, rows, map, image + c);
    for (; c + 4 * kLanes <= end; c += 4 * kLanes)
      add_cells<Floats, 4>(roi_gradient + c, cells, columns, rows, map, image + c);
    for (; c + kLanes <= end; c += kLanes) add_cells<Floats, 1>(roi_gradient + c, cells, columns, rows, map, image + c);
    for (; c < end; ++c) add_cells<float, 1>(roi_gradient + c, cells, columns, rows, map, image + c);
  }
}

REFDET_SIMD void add_all(const float* pooled, int64_t cells, const std::vector<int64_t>& rois,
                         const std::vector<Readers>& x, const std::vector<Readers>& y, const Map<float>& map,
                         float* image, int64_t begin, int64_t end) {
  add_rois(pooled, cells, rois, x, y, map, image, begin, end);
}

REFDET_SIMD void add_all(const at::BFloat16* pooled, int64_t cells, const std::vector<int64_t>& rois,
                         const std::vector<Readers>& x, const std::vector<Readers>& y, const Map<float>& map,
                         float* image, int64_t begin, int64_t end) {
  add_rois(pooled, cells, rois, x, y, map, image, begin, end);
}

// Image index of each RoI (image index, x1, y1, x2, y2); raises an error for one outside the batch.
std::vector<int64_t> images_of(const at::Tensor& rois, int64_t batch) {
  std::vector<int64_t> images(rois.size(0));
  const float* roi = rois.const_data_ptr<float>();
  for (size_t i = 0; i < images.size(); ++i) {
    const float image = roi[5 * i];
    TORCH_CHECK_INDEX(image >= 0 && image < static_cast<float>(batch), "RoI pooling: RoI ", i, " is on image ", image,
                      " of a batch of ", batch);
    images[i] = static_cast<int64_t>(image);
  }
  return images;
}

// Requests huge pages for large new buffers, as page faults would otherwise take longer than the pooling.
void request_huge_pages(const at::Tensor& buffer) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(buffer.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + buffer.nbytes()) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only advice: it may fail
#endif
}

template <typename T, typename Out>
void pool(const at::Tensor& x, const at::Tensor& rois, const Sampling& sampling, at::Tensor& out) {
  const std::vector<int64_t> images = images_of(rois, x.size(0));
  const Map<const T> map(x, x.const_data_ptr<T>());
  const float* box = rois.const_data_ptr<float>();
  Out* cells = out.mutable_data_ptr<Out>();
  at::parallel_for(0, rois.size(0), 1, [&](int64_t begin, int64_t end) {
    Axis columns, rows;
    for (int64_t i = begin; i < end; ++i) {
      columns.fill(sampling, box[5 * i + 1], box[5 * i + 3], map.width);
      rows.fill(sampling, box[5 * i + 2], box[5 * i + 4], map.height);
      pool_one(map.data + images[i] * map.image_stride, map, columns, rows,
               cells + i * sampling.cells() * sampling.cells() * map.channels);
    }
  });
}

template <typename T>
void pool_backward(const at::Tensor& pooled, const at::Tensor& rois, const Sampling& sampling, at::Tensor& gradient) {
  const Map<float> map(gradient, gradient.mutable_data_ptr<float>());
  const std::vector<int64_t> images = images_of(rois, gradient.size(0));
  std::vector<std::vector<int64_t>> rois_of(gradient.size(0));
  for (size_t i = 0; i < images.size(); ++i) rois_of[images[i]].push_back(static_cast<int64_t>(i));

  const float* box = rois.const_data_ptr<float>();
  std::vector<Readers> columns, rows;
  Axis axis;
  for (int64_t i = 0; i < rois.size(0); ++i) {
    axis.fill(sampling, box[5 * i + 1], box[5 * i + 3], map.width);
    columns.emplace_back(axis);
    axis.fill(sampling, box[5 * i + 2], box[5 * i + 4], map.height);
    rows.emplace_back(axis);
  }
  const T* cells = pooled.const_data_ptr<T>();
  const int64_t groups = (map.channels + kLanes - 1) / kLanes;  // groups of channels per image
  at::parallel_for(0, gradient.size(0) * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t next; begin < end; begin = next) {
      const int64_t image = begin / groups;
      next = std::min(end, (image + 1) * groups);
      const int64_t from = begin % groups * kLanes;
      const int64_t to = std::min(map.channels, (next - image * groups) * kLanes);
      add_all(cells, sampling.cells(), rois_of[image], columns, rows, map, map.data + image * map.image_stride, from,
              to);
    }
  });
}

at::Tensor roi_pool_cpu(const at::Tensor& x, const at::Tensor& rois, int64_t size, double stride, int64_t samples,
                        bool crop, bool mean) {
  const Sampling sampling = check_pooling(x.sizes(), x, rois, size, stride, samples, crop, mean);
  const at::Tensor map = with_channels_last(x), boxes = rois.contiguous();
  const auto type = mean ? at::kFloat : x.scalar_type();
  at::Tensor out = at::empty({rois.size(0), x.size(1), sampling.cells(), sampling.cells()}, x.options().dtype(type),
                             at::MemoryFormat::ChannelsLast);
  request_huge_pages(out);
  if (x.scalar_type() == at::kFloat) {
    pool<float, float>(map, boxes, sampling, out);
  } else if (mean) {
    pool<at::BFloat16, float>(map, boxes, sampling, out);
  } else {
    pool<at::BFloat16, at::BFloat16>(map, boxes, sampling, out);
  }
  return out;
}

at::Tensor roi_pool_backward_cpu(const at::Tensor& gradient, const at::Tensor& rois, at::IntArrayRef shape,
                                 int64_t size, double stride, int64_t samples, bool crop, bool mean) {
  const Sampling sampling = check_pooling(shape, gradient, rois, size, stride, samples, crop, mean);
  check_pooled(gradient, rois, shape, sampling);
  const at::Tensor pooled = gradient.contiguous(at::MemoryFormat::ChannelsLast), boxes = rois.contiguous();
  at::Tensor out =
      at::zeros({shape[0], shape[2], shape[3], shape[1]}, gradient.options().dtype(at::kFloat)).permute({0, 3, 1, 2});
  if (gradient.scalar_type() == at::kFloat) {
    pool_backward<float>(pooled, boxes, sampling, out);
  } else {
    pool_backward<at::BFloat16>(pooled, boxes, sampling, out);
  }
  return out.to(gradient.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) {
  m.impl("roi_pool", &roi_pool_cpu);
  m.impl("roi_pool_backward", &roi_pool_backward_cpu);
}

}  // namespace refdet
