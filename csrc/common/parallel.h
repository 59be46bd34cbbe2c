// Dynamic scheduling of work over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace refdet {

// Calls `work` with each index below `pieces`, on all threads: an idle thread takes the next piece, so that a busy core
// delays only its current one. `start` is called once on each thread and returns the state passed to `work`.
template <typename Start, typename Work>
void parallel_tasks(int64_t pieces, const Start& start, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(pieces, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto kept = start();
    for (int64_t piece = next++; piece < pieces; piece = next++) work(kept, piece);
  });
}

}  // namespace refdet
