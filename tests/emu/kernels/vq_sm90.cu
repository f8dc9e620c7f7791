// vq_linear of int8 words for compute capability 9.0 against plain loops: both codebooks, sums to the last
// bit, shapes ragged in all three dimensions, more tiles than blocks and fewer.
//
//   vq_sm90 CASE
#include <random>
#include <vector>

#include "case.h"
#include "vq/vq_int8_sm90.cu"

namespace vdit {
namespace {

struct Shape {
  int64_t m, n, k;
  bool large = true;  // which of the tiles
};

// Which index quad j of lane l has, by the words of vdit/vq.h: row and first channel within a 32 x 64 tile.
int64_t quad_row(int64_t l, int64_t j) { return 8 * (j % 8 / 2) + l / 4; }
int64_t quad_channel(int64_t l, int64_t j) { return 32 * (j / 8) + 16 * (j % 2) + 4 * (l % 4); }

// quads [n, k / 4]: one byte each, or 12 bits.
std::vector<uint8_t> pack(std::vector<int> const& quads, VqFormat format, int64_t n, int64_t k) {
  int64_t const bits = format == VqFormat::k256x4 ? 8 : 12;
  int64_t const strips = (n + 31) / 32, tiles = (k + 63) / 64;
  std::vector<uint8_t> out(static_cast<size_t>(strips * tiles * 64 * bits), 0);
  for (int64_t tile = 0; tile < strips * tiles; ++tile) {
    for (int64_t lane = 0; lane < 32; ++lane) {
      for (int64_t j = 0; j < 16; ++j) {
        int64_t const row = tile / tiles * 32 + quad_row(lane, j);
        int64_t const channel = tile % tiles * 64 + quad_channel(lane, j);
        if (row >= n || channel >= k) continue;
        int const quad = quads[size_t((row * k + channel) / 4)];
        for (int64_t bit = 0; bit < bits; ++bit) {
          int64_t const at = bits * j + bit;
          out[size_t((tile * 32 + lane) * 2 * bits + at / 8)] |=
              static_cast<uint8_t>((quad >> bit & 1) << (at % 8));
        }
      }
    }
  }
  return out;
}

void expect_sums(VqFormat format, Shape const& s) {
  std::mt19937 random(static_cast<unsigned>(s.m * 31 + s.n * 7 + s.k));
  bool const words4 = format == VqFormat::k256x4;
  alignas(4) int8_t codebook[256 * 4];
  for (auto& v : codebook) v = static_cast<int8_t>(random() % 255 - 127);
  std::vector<int> quads(size_t(s.n * s.k / 4));
  std::vector<int8_t> values(size_t(s.n * s.k));
  for (size_t i = 0; i < quads.size(); ++i) {
    quads[i] = static_cast<int>(random() % (words4 ? 256 : 4096));
    for (size_t j = 0; j < 4; ++j) {
      values[i * 4 + j] = words4 ? codebook[size_t(quads[i]) * 4 + j]
                                 : codebook[size_t(j < 2 ? quads[i] % 64 : quads[i] / 64) * 2 + j % 2];
    }
  }
  auto const codes = pack(quads, format, s.n, s.k);
  VqLinearParams p;
  p.stride_x = s.k + 16;
  std::vector<int8_t> x(size_t(s.m * p.stride_x), 0x33);
  for (auto& v : x) v = static_cast<int8_t>(random() % 256 - 128);
  std::vector<int32_t> out(size_t(s.m * s.n), 0x7fabcdef);
  p.x = x.data(), p.codes = codes.data(), p.codebook = codebook;
  p.m = s.m, p.n = s.n, p.k = s.k;
  p.format = format;
  p.is_int8 = true;
  p.epilogue.out = out.data();
  p.epilogue.raw_sums = true;
  p.epilogue.rows_per_batch = s.m;
  EXPECT(can_run_vq_linear_sm90(p));
  auto const tiles = vq_tiles_sm90(format);
  VqTileSm90 tile = s.large ? tiles.large : tiles.small;
  tile.group = 2;
  sm90::vq_int8(p, tile, nullptr);
  for (int64_t i = 0; i < s.m * s.n; ++i) {
    int64_t sum = 0;
    for (int64_t c = 0; c < s.k; ++c)
      sum += x[size_t(i / s.n * p.stride_x + c)] * values[size_t(i % s.n * s.k + c)];
    if (out[size_t(i)] == sum) continue;
    throw std::runtime_error("sum " + std::to_string(out[size_t(i)]) + " of row " + std::to_string(i / s.n) +
                             ", column " + std::to_string(i % s.n) + ", where " + std::to_string(sum) +
                             " was expected");
  }
}

// The blocks are three (launch.h): one tile, several a block with a group that is not whole, many stages.
void test_shapes(VqFormat format) {
  for (Shape const& s :
       {Shape{1, 8, 16}, Shape{270, 264, 144}, Shape{530, 520, 64, false}, Shape{70, 41, 1120}}) {
    expect_sums(format, s);
  }
}

}  // namespace
}  // namespace vdit

int main(int, char** argv) {
  using namespace vdit;
  return run_case(
      {
          {"k256x4", [] { test_shapes(VqFormat::k256x4); }},
          {"k64x2", [] { test_shapes(VqFormat::k64x2); }},
      },
      argv[1]);
}
