// Errors that the user reads: the message alone, without the place in our source that raised it.
#pragma once
#include <sstream>
#include <stdexcept>

namespace torch_curvature {
template <class... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
}  // namespace torch_curvature

#define CURVATURE_CHECK(condition, ...)                      \
  do {                                                       \
    if (!(condition)) ::torch_curvature::raise(__VA_ARGS__); \
  } while (0)
