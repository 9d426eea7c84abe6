#pragma once

namespace gloo {
namespace transport {
// Only ever behind a shared_ptr that libtorch made.
class Device;
} // namespace transport
} // namespace gloo
