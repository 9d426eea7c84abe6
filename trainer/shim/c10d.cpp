// A C interface to torch's process groups: c10d::TCPStore, ProcessGroupGloo and, if CUDA's headers are
// available, ProcessGroupNCCL.
//
// Every function that can fail takes a buffer for the error message, and on failure fills it and
// returns null, false or -1. No exception leaves this file. Tensors are tch's: pointers to at::Tensor.

#include <cstdint>
#include <cstdlib>
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "error.h"

namespace {

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using GroupPtr = c10::intrusive_ptr<c10d::Backend>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

template <typename F>
void* started(Error error, F start) {
  return guarded<void*>(error, nullptr, [&] { return new WorkPtr(start()); });
}

std::chrono::milliseconds milliseconds(int64_t count) {
  return std::chrono::milliseconds(count);
}

} // namespace

extern "C" {

void* finetune_store_open(
    const char* host, uint16_t port, bool is_server, int64_t timeout, Error error) {
  return guarded<void*>(error, nullptr, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server;
    options.waitWorkers = false; // The caller waits itself, to name the missing ranks.
    options.timeout = milliseconds(timeout);
    return new StorePtr(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}

bool finetune_store_set(void* store, const char* key, const char* value, Error error) {
  return guarded(error, false, [&] {
    (*static_cast<StorePtr*>(store))->set(std::string(key), std::string(value));
    return true;
  });
}

// Copies a value and returns its length; 0 if there is none, -1 on an error.
int64_t finetune_store_get(
    void* store, const char* key, char* value, size_t size, Error error) {
  return guarded<int64_t>(error, -1, [&]() -> int64_t {
    auto& opened = *static_cast<StorePtr*>(store);
    if (!opened->check({key})) {
      return 0;
    }
    auto found = opened->get(key);
    auto length = std::min(found.size(), size);
    std::memcpy(value, found.data(), length);
    return static_cast<int64_t>(length);
  });
}

void finetune_store_close(void* store) {
  delete static_cast<StorePtr*>(store);
}

// `address` is the address this rank listens on, or empty for this machine's host name.
void* finetune_gloo_open(
    void* store,
    const char* prefix,
    int rank,
    int size,
    const char* address,
    const char* interface,
    int64_t timeout,
    Error error) {
  return guarded<void*>(error, nullptr, [&]() -> void* {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout));
    if (*interface != '\0') {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(interface));
    } else if (*address != '\0') {
      options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(address));
    } else {
      options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
    }
    auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<StorePtr*>(store));
    return new GroupPtr(c10::make_intrusive<c10d::ProcessGroupGloo>(own, rank, size, options));
  });
}

// Fails if this was built without CUDA's headers.
void* finetune_nccl_open(
    void* store, const char* prefix, int rank, int size, int64_t timeout, Error error) {
  return guarded<void*>(error, nullptr, [&]() -> void* {
#ifdef USE_C10D_NCCL
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = milliseconds(timeout);
    auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<StorePtr*>(store));
    return new GroupPtr(c10::make_intrusive<c10d::ProcessGroupNCCL>(own, rank, size, options));
#else
    (void)store, (void)prefix, (void)rank, (void)size, (void)timeout;
    throw std::runtime_error("this trainer was built without the feature `cuda`");
#endif
  });
}

void finetune_group_close(void* group) {
  delete static_cast<GroupPtr*>(group);
}

void* finetune_all_reduce(void* group, at::Tensor* tensor, Error error) {
  return started(error, [&] {
    std::vector<at::Tensor> tensors{*tensor};
    return (*static_cast<GroupPtr*>(group))->allreduce(tensors);
  });
}

void* finetune_all_gather(void* group, at::Tensor* gathered, at::Tensor* shard, Error error) {
  return started(
      error, [&] { return (*static_cast<GroupPtr*>(group))->_allgather_base(*gathered, *shard); });
}

void* finetune_all_to_all(void* group, at::Tensor* received, at::Tensor* sent, Error error) {
  return started(error, [&] {
    std::vector<int64_t> equal;
    return (*static_cast<GroupPtr*>(group))->alltoall_base(*received, *sent, equal, equal);
  });
}

// Waits for a collective, and frees it.
bool finetune_work_wait(void* work, Error error) {
  auto* started = static_cast<WorkPtr*>(work);
  bool succeeded = guarded(error, false, [&] {
    (*started)->wait();
    return true;
  });
  delete started;
  return succeeded;
}

// Exits at once: no destructor waits for a rank that will not answer.
void finetune_exit(int code) {
  std::_Exit(code);
}

} // extern "C"
