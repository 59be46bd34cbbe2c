// Runs CUDA kernels on a CPU, to check their arithmetic, bounds and barriers: one block after another, its threads in an
// order that the caller chooses, each thread up to its next barrier. Races show as results that depend on the order.
// Not checked are the visibility of memory between threads, launches and speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline unsigned long long atomicOr(unsigned long long* at, unsigned long long bits) {
  const unsigned long long before = *at;
  *at |= bits;
  return before;
}

// Always false: kernels may use the vote only to skip work when it is true.
inline bool __all_sync(unsigned, bool) { return false; }

namespace threads {

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool ended = false;
};
static ucontext_t scheduler;
static Thread* current = nullptr;
static const std::function<void()>* body = nullptr;
constexpr size_t kStack = 64 << 10;

inline void enter() {
  (*body)();
  current->ended = true;
  swapcontext(&current->context, &scheduler);
}

// Runs `kernel` in each of `blocks` blocks of `per_block` threads; threads go in ascending order with seed 0, in
// descending order with seed 1, and else shuffled anew between any two barriers. False if some threads end while others
// wait at a barrier, which would hang a GPU.
inline bool run(int64_t blocks, int64_t per_block, unsigned seed, const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  std::vector<Thread> all(per_block);
  for (Thread& thread : all) thread.stack.reset(new char[kStack]);
  std::vector<int64_t> order(per_block);
  for (int64_t i = 0; i < per_block; ++i) order[i] = seed == 1 ? per_block - 1 - i : i;
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = static_cast<unsigned>(per_block);
  body = &kernel;
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (Thread& thread : all) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      thread.ended = false;
      makecontext(&thread.context, &enter, 0);
    }
    int64_t ended = 0;
    while (ended < per_block) {
      if (seed > 1) std::shuffle(order.begin(), order.end(), random);
      for (const int64_t i : order) {
        current = &all[i];
        threadIdx.x = static_cast<unsigned>(i);
        swapcontext(&scheduler, &current->context);
      }
      ended = std::count_if(all.begin(), all.end(), [](const Thread& thread) { return thread.ended; });
      if (ended > 0 && ended < per_block) return false;
    }
  }
  return true;
}

}  // namespace threads

inline void __syncthreads() {
  threads::Thread* const own = threads::current;
  const unsigned index = threadIdx.x;
  swapcontext(&own->context, &threads::scheduler);
  threads::current = own;
  threadIdx.x = index;
}
