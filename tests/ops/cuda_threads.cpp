// C functions that run kernels of csrc/*/*.cuh; each returns whether all threads of a block reached every barrier.
#include "cuda_threads.h"

#include "epilogue/bias_relu.cuh"
#include "nms/greedy.cuh"

extern "C" {

bool keys(const float* scores, const int64_t* images, int64_t n, int64_t num_images, unsigned seed, int64_t* out) {
  return threads::run((n + 255) / 256, 256, seed, [=] { refdet::key_kernel(scores, images, n, num_images, out); });
}

bool greedy(const float* boxes, const int64_t* groups, const int64_t* sorted, const int64_t* order, int64_t n,
            float threshold, int64_t limit, int64_t kept_stride, int64_t num_images, unsigned seed,
            int64_t* kept, int64_t* kept_counts) {
  const refdet::Candidates all{reinterpret_cast<const float4*>(boxes), groups, order, nullptr, threshold};
  return threads::run(num_images, refdet::kThreads, seed,
                      [=] { refdet::greedy_kernel(all, sorted, n, limit, kept_stride, kept, kept_counts); });
}

bool group_greedy(const float* boxes, const int64_t* sorted_groups, const int64_t* sorted, const int64_t* order,
                  const int64_t* positions, int64_t n, float threshold, unsigned seed, int64_t* scratch,
                  int64_t* kept) {
  const refdet::Candidates all{reinterpret_cast<const float4*>(boxes), nullptr, order, positions, threshold};
  return threads::run(n, refdet::kThreads, seed,
                      [=] { refdet::group_greedy_kernel(all, sorted, sorted_groups, n, scratch, kept); });
}

bool bias_relu(const float* x, int64_t x_stride, const float* bias, const float* shortcut, int64_t shortcut_stride,
               float* out, int64_t out_stride, int64_t rows, int64_t channels, bool whole, unsigned seed) {
  const int64_t columns = whole ? channels / 4 : channels;
  return threads::run(refdet::blocks_for(rows, columns), refdet::kThreadsPerBlock, seed, [=] {
    (whole ? refdet::bias_relu_kernel<float, 4> : refdet::bias_relu_kernel<float, 1>)(
        x, x_stride, bias, shortcut, shortcut_stride, out, out_stride, rows, columns);
  });
}
}
