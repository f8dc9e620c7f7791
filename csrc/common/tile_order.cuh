// Which tile of a product a block works on.
#pragma once
#include <cstdint>

#include "common/device.h"

namespace vdit {

// `group` tiles along m with all those along n, then the next ones, so that blocks at work at one time share
// rows of x and of the weight in L2. All in 32 bits: launchers see to it that group * tiles_n fits.
struct TileOrder {
  int32_t tiles_m, tiles_n, group;

  struct Tile {
    int32_t m, n;
  };

  VDIT_DEVICE int32_t count() const { return tiles_m * tiles_n; }
  VDIT_DEVICE Tile at(int32_t i) const {
    int32_t const whole = group * tiles_n, first = i / whole * group, rest = i % whole;
    int32_t const left = tiles_m - first, side = left < group ? left : group;
    return {first + rest % side, rest / side};
  }
};

}  // namespace vdit
