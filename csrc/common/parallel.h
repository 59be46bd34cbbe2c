// Work shared out to threads piece by piece.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace refdet {

// Calls `work` with every number below `pieces`, on all threads: whoever is done takes the next, so that a processor
// which others use too delays only the piece it is at. `start` is called once on each thread and gives `work` what it
// keeps.
template <typename Start, typename Work>
void parallel_tasks(int64_t pieces, const Start& start, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(pieces, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto kept = start();
    for (int64_t piece = next++; piece < pieces; piece = next++) work(kept, piece);
  });
}

}  // namespace refdet
