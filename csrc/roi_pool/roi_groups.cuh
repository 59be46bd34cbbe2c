// Lists the RoIs of each image, so that in the backward pass each position of a feature map reads only those of its image.
#pragma once

#include <cstdint>

namespace refdet {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The RoIs of image i are member[first[i]] to member[first[i + 1] - 1], ascending.
struct Groups {
  int32_t *member, *first;
};

// One warp per image: it counts the RoIs of earlier images, after which it lists those of its own image. RoIs whose
// `image_of` is negative belong to no image.
__global__ void group_kernel(const int64_t* image_of, int64_t rois, Groups groups) {
  const int64_t image = blockIdx.x;
  const int lane = threadIdx.x;
  int32_t first = 0;
  for (int64_t start = 0; start < rois; start += kWarp) {
    const int64_t other = start + lane < rois ? image_of[start + lane] : -1;
    first += __popc(__ballot_sync(kAllLanes, other >= 0 && other < image));
  }
  int32_t end = first;
  for (int64_t start = 0; start < rois; start += kWarp) {
    const bool belongs = start + lane < rois && image_of[start + lane] == image;
    const unsigned all = __ballot_sync(kAllLanes, belongs);
    if (belongs) groups.member[end + __popc(all & ((1u << lane) - 1))] = static_cast<int32_t>(start + lane);
    end += __popc(all);
  }
  if (lane > 0) return;
  groups.first[image] = first;
  if (image == gridDim.x - 1) groups.first[image + 1] = end;
}

}  // namespace refdet
