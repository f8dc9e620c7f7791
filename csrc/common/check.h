// Errors are one sentence: the op, what was expected, what came.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace vdit {

template <class... Parts>
std::string concat(Parts const&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace vdit

// VDIT_CHECK(s_q > 0, "block_sparse_attention", "s_q must be positive, got ", s_q)
#define VDIT_CHECK(condition, op, ...)                                          \
  do {                                                                          \
    if (!(condition))                                                           \
      throw std::runtime_error(::vdit::concat("vdit::", op, ": ", __VA_ARGS__)); \
  } while (0)
