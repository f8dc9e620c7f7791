// What the test programs share: a program runs the case that its argument names, and prints "ok" or what went
// wrong.
#pragma once
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#define EXPECT(condition)                                                                             \
  do {                                                                                                \
    if (!(condition)) throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition); \
  } while (0)

// A functor kernel around a body: CASE_KERNEL(Name, threads) { body using p, the program's Buffers, and smem
// }.
#define CASE_KERNEL(Name, threads)                                  \
  struct Name {                                                     \
    using Params = Buffers;                                         \
    static constexpr int kThreads = threads;                        \
    static constexpr int kMinBlocks = 1;                            \
    VDIT_DEVICE void operator()(Params const& p, char* smem) const; \
  };                                                                \
  VDIT_DEVICE void Name::operator()([[maybe_unused]] Params const& p, [[maybe_unused]] char* smem) const

namespace vdit {

// The exit status.
inline int run_case(std::map<std::string, std::function<void()>> const& cases, char const* name) {
  try {
    cases.at(name)();
    printf("ok\n");
    return 0;
  } catch (std::exception const& problem) {
    printf("%s\n", problem.what());
    return 1;
  }
}

}  // namespace vdit
