// GPU functions that tch does not bind: memory statistics, and variable-length attention.
//
// Uses only interfaces of ATen and c10 that need no CUDA headers, so that every build has them; without
// a GPU every function fails with a message.

#include <cstdint>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <c10/core/CachingDeviceAllocator.h>

#include "error.h"

extern "C" {

// Returns the peak number of bytes that torch has reserved on a device so far, or -1.
int64_t finetune_device_peak_memory(int device, Error error) {
  return guarded<int64_t>(error, -1, [&]() -> int64_t {
    auto* allocator = c10::getDeviceAllocator(c10::kCUDA);
    if (!allocator->initialized()) {
      return 0;
    }
    auto index = static_cast<c10::DeviceIndex>(device);
    return allocator->getDeviceStats(index).reserved_bytes[0].peak;
  });
}

// Writes four new tensors: the result, its logsumexp, and two that the backward operator takes.
// `window` is how many earlier positions a query attends to, or -1 for all.
bool finetune_flash_attention(
    at::Tensor* q,
    at::Tensor* k,
    at::Tensor* v,
    at::Tensor* starts,
    int64_t longest,
    int64_t window,
    at::Tensor** results,
    Error error) {
  return guarded(error, false, [&] {
    auto all = at::_flash_attention_forward(
        *q, *k, *v, *starts, *starts, longest, longest, /*dropout_p=*/0.0, /*is_causal=*/true,
        /*return_debug_mask=*/false, /*scale=*/std::nullopt, /*window_size_left=*/window,
        /*window_size_right=*/int64_t{window < 0 ? -1 : 0});
    results[0] = new at::Tensor(std::get<0>(all));
    results[1] = new at::Tensor(std::get<1>(all));
    results[2] = new at::Tensor(std::get<2>(all));
    results[3] = new at::Tensor(std::get<3>(all));
    return true;
  });
}

} // extern "C"
