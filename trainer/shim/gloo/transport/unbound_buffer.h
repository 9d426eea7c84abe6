#pragma once

namespace gloo {
namespace transport {
// What SendWork and RecvWork own; we never make one.
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};
} // namespace transport
} // namespace gloo
