// The core alone, without CuTe: barriers, shuffles and an exception over block.h and collectives.h.
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "emu/collectives.h"

using namespace vdit::emu;

int main() {
  std::vector<uint64_t> out(2 * 96);
  run_grid({"exchange", {2, 1, 1}, 96, 0, &out, [](void const* params, char*) {
              auto& values =
                  *const_cast<std::vector<uint64_t>*>(static_cast<std::vector<uint64_t> const*>(params));
              auto const i = static_cast<unsigned>(thread_index());
              auto const block = block_index().x * 96;
              uint64_t const lane = shuffle("shuffle", i, 31 - static_cast<int>(i % 32), Site::here());
              values[block + i] = lane;
              sync_block(Site::here());
              uint64_t const other = values[block + 95 - i];
              sync_block(Site::here());
              values[block + i] = other;
            }});
  for (unsigned i = 0; i < 192; ++i) {
    unsigned const from = 95 - i % 96;
    if (out[i] != from / 32 * 32 + 31 - from % 32) return printf("wrong at %u\n", i);
  }
  try {
    run_grid({"thrower", {1, 1, 1}, 64, 0, nullptr, [](void const*, char*) {
                sync_block(Site::here());
                if (thread_index() == 40) throw std::out_of_range("thrown");
                sync_block(Site::here());
              }});
  } catch (std::out_of_range const&) {
    return puts("ok") < 0;
  }
  return 1;
}
