#pragma once

#include <chrono>

namespace gloo {
// Only ever behind a shared_ptr that libtorch made; ProcessGroupGloo::setTimeout, which we never
// call, calls its method of this name.
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
} // namespace gloo
