// Dynamic scheduling of work over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace refdet {

// Calls `work(state, i)` for each task i in [0, tasks), on all threads: an idle thread takes the next task, so that a
// busy core delays only its current one. `start` is called once on each thread and returns its `state`.
template <typename Start, typename Work>
void parallel_tasks(int64_t tasks, const Start& start, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto state = start();
    for (int64_t task = next++; task < tasks; task = next++) work(state, task);
  });
}

}  // namespace refdet
