// The error convention of the shims: the caller passes a buffer for a message, and no exception leaves
// C++.

#pragma once

#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

struct Error {
  char* text;
  size_t size;
};

// Runs `body`; on an exception, writes its message and returns `failed`.
template <typename R, typename F>
R guarded(Error error, R failed, F body) {
  const char* what = "an exception that is not a std::exception";
  try {
    return body();
  } catch (const c10::Error& caught) {
    // Without the C++ backtrace, which helps nobody who reads a run's report.
    std::strncpy(error.text, caught.what_without_backtrace(), error.size - 1);
    return failed;
  } catch (const std::exception& caught) {
    std::strncpy(error.text, caught.what(), error.size - 1);
    return failed;
  } catch (...) {
    std::strncpy(error.text, what, error.size - 1);
    return failed;
  }
}
