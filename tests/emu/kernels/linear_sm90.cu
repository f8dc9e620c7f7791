// The linear kernels for compute capability 9.0 against plain loops: every format, sums to the last bit,
// shapes ragged in all three dimensions, more tiles than blocks and fewer.
//
//   linear_sm90 CASE
#include <cstdio>
#include <random>
#include <vector>

#include "case.h"
#include "linear/linear_int4_sm90.cu"
#include "linear/linear_int8_sm90.cu"
#include "linear/linear_planes_sm90.cu"
#include "linear/linear_sm90.cu"
#include "linear/linear_table_sm90.cu"

namespace vdit {
namespace {

using Format = WeightFormat;

struct Shape {
  int64_t m, n, k;
  bool large = true;  // which of the format's tiles
};

// Weight codes, and the values that they stand for.
struct Weights {
  std::vector<uint8_t> codes;   // [n, k], or values where int8
  std::vector<int32_t> values;  // [n, k]
  std::vector<uint8_t> memory, low;
  std::vector<int8_t> table;
  int64_t stride = 0;
};

// 32 x 32 tiles of 512 bytes, by the words of vdit/linear.h.
std::vector<uint8_t> pack_nibbles(std::vector<uint8_t> const& codes, int64_t n, int64_t k) {
  int64_t const strips = (n + 31) / 32, tiles = (k + 31) / 32;
  std::vector<uint8_t> out(static_cast<size_t>(strips * tiles * 512), 0);
  auto const code = [&](int64_t i, int64_t j) -> int {
    return i < n && j < k ? codes[size_t(i * k + j)] : 0;
  };
  for (int64_t at = 0; at < static_cast<int64_t>(out.size()); ++at) {
    int64_t const tile = at / 512, l = at % 512 / 16, j = at % 16;
    int64_t const row = tile / tiles * 32 + 8 * (j / 4 % 2) + l / 4;
    int64_t const column = tile % tiles * 32 + 16 * (j / 8) + 4 * (l % 4) + j % 4;
    out[size_t(at)] = static_cast<uint8_t>(code(row, column) | code(row + 16, column) << 4);
  }
  return out;
}

std::vector<uint8_t> pack_table(std::vector<uint8_t> const& codes, int64_t n, int64_t k) {
  int64_t const strips = (n + 31) / 32, tiles = (k + 31) / 32;
  std::vector<uint8_t> out(static_cast<size_t>(strips * tiles * 512), 0);
  for (int64_t at = 0; at < static_cast<int64_t>(out.size()) / 2; ++at) {
    int64_t const tile = at / 256, l = at % 256 / 8, h = at % 8;
    int64_t const row = tile / tiles * 32 + 8 * (h / 2) + l / 4;
    unsigned word = 0;
    for (int t = 0; t < 4; ++t) {
      int64_t const column = tile % tiles * 32 + 16 * (h % 2) + 4 * (l % 4) + t;
      if (row < n && column < k) word |= unsigned(codes[size_t(row * k + column)]) << (4 * t);
    }
    out[size_t(at * 2)] = static_cast<uint8_t>(word),
                    out[size_t(at * 2 + 1)] = static_cast<uint8_t>(word >> 8);
  }
  return out;
}

Weights make_weights(Format format, int table_size, int64_t n, int64_t k, std::mt19937& random,
                     bool extreme) {
  Weights w;
  // Of three-bit codes too the nibble's bit 3 is drawn: it must not be read.
  int const most = format == Format::kInt4 || format == Format::kTable ? 16 : 256;
  w.codes.resize(size_t(n * k)), w.values.resize(size_t(n * k));
  w.table.resize(size_t(n * table_size));
  for (auto& v : w.table) v = static_cast<int8_t>(random() % 255 - 127);
  for (size_t i = 0; i < w.codes.size(); ++i) {
    int const c =
        extreme ? (format == Format::kInt8 ? 128 : most - 1) : static_cast<int>(random() % unsigned(most));
    w.codes[i] = static_cast<uint8_t>(c);
    w.values[i] = format == Format::kInt8 ? static_cast<int8_t>(c)
                  : format == Format::kTable
                      ? w.table[i / size_t(k) * size_t(table_size) + size_t(c % table_size)]
                  : format == Format::kInt4 ? c
                                            : c - 128;
  }
  if (format == Format::kInt8) {
    w.stride = k + 32;
    w.memory.assign(size_t(n * w.stride), 0x55);
    for (int64_t i = 0; i < n * k; ++i) w.memory[size_t(i / k * w.stride + i % k)] = w.codes[size_t(i)];
  } else if (format == Format::kTable) {
    w.memory = pack_table(w.codes, n, k);
  } else if (format == Format::kInt4) {
    w.memory = pack_nibbles(w.codes, n, k);
  } else {
    auto half = w.codes;
    for (auto& c : half) c = c >> 4;
    w.memory = pack_nibbles(half, n, k);
    for (size_t i = 0; i < half.size(); ++i) half[i] = w.codes[i] & 15;
    w.low = pack_nibbles(half, n, k);
  }
  return w;
}

struct Problem {
  Weights w;
  std::vector<int8_t> x;
  std::vector<int64_t> sums;  // [m, n]
  LinearParams p;

  Problem(Format format, int table_size, Shape const& s, bool extreme = false) {
    std::mt19937 random(static_cast<unsigned>(s.m * 31 + s.n * 7 + s.k));
    w = make_weights(format, table_size, s.n, s.k, random, extreme);
    p.stride_x = s.k + 16;
    x.assign(size_t(s.m * p.stride_x), 0x33);
    for (int64_t i = 0; i < s.m * s.k; ++i) {
      x[size_t(i / s.k * p.stride_x + i % s.k)] = extreme ? -128 : static_cast<int8_t>(random() % 255 - 127);
    }
    p.x = x.data(), p.weight = w.memory.data(), p.weight_low = w.low.data(), p.table = w.table.data();
    p.stride_weight = w.stride;
    p.m = s.m, p.n = s.n, p.k = s.k;
    p.table_size = table_size;
    p.format = format;
    sums.resize(size_t(s.m * s.n));
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        int64_t sum = 0;
        for (int64_t c = 0; c < s.k; ++c)
          sum += x[size_t(i * p.stride_x + c)] * w.values[size_t(j * s.k + c)];
        sums[size_t(i * s.n + j)] = sum;
      }
    }
  }
};

void run_tile(LinearParams const& p, bool large) {
  auto const tiles = linear_tiles_sm90(p.format);
  LinearTileSm90 tile = large ? tiles.large : tiles.small;
  tile.group = 2;
  EXPECT(can_run_linear_sm90(p));
  if (p.format == Format::kInt8) return sm90::linear_int8(p, tile, nullptr);
  if (p.format == Format::kInt4) return sm90::linear_int4(p, tile, nullptr);
  if (p.format == Format::kTable) return sm90::linear_table(p, tile, nullptr);
  sm90::linear_planes(p, tile, nullptr);
}

void expect_sums(Format format, int table_size, Shape const& s, bool extreme = false) {
  Problem problem(format, table_size, s, extreme);
  std::vector<int32_t> out(size_t(s.m * s.n), 0x7fabcdef);
  problem.p.epilogue.out = out.data();
  problem.p.epilogue.raw_sums = true;
  problem.p.epilogue.rows_per_batch = s.m;
  run_tile(problem.p, s.large);
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] == problem.sums[i]) continue;
    throw std::runtime_error("sum " + std::to_string(out[i]) + " of row " + std::to_string(int64_t(i) / s.n) +
                             ", column " + std::to_string(int64_t(i) % s.n) + ", where " +
                             std::to_string(problem.sums[i]) + " was expected");
  }
}

// The blocks are three (launch.h): one tile, several a block with a group that is not whole, many stages.
void test_shapes(Format format, int table_size) {
  for (Shape const& s :
       {Shape{1, 8, 16}, Shape{270, 264, 144}, Shape{530, 520, 64, false}, Shape{70, 40, 1040}}) {
    expect_sums(format, table_size, s);
  }
}

// What is largest in size: no sum leaves 32 bits.
void test_extremes() {
  for (Format format : {Format::kInt8, Format::kInt4, Format::kNibblePlanes}) {
    expect_sums(format, 0, {2, 40, 65536, false}, true);
  }
}

// All that an epilogue reads, in numbers that two-byte types hold.
struct EpilogueInputs {
  static constexpr int64_t kBatch = 50;  // rows; three batches
  std::vector<float> x_scale, scale, zero, bias, gate, residual;
  std::vector<int32_t> x_sum;

  explicit EpilogueInputs(Shape const& s) {
    std::mt19937 random(5);
    auto const fill = [&](std::vector<float>& v, int64_t size) {
      for (int64_t i = 0; i < size; ++i) v.push_back(static_cast<float>(random() % 128) / 64.f - 1.f);
    };
    fill(x_scale, s.m), fill(scale, s.n), fill(zero, s.n), fill(bias, s.n);
    for (auto& v : x_scale) v /= 1024.f;  // fp16 holds the results
    fill(gate, s.m / kBatch * s.n), fill(residual, s.m * s.n);
    for (int64_t i = 0; i < s.m; ++i) x_sum.push_back(static_cast<int32_t>(i) - 20);
  }
};

template <class T>
std::vector<T> as_type(std::vector<float> const& v) {
  std::vector<T> out;
  for (float x : v) out.push_back(T(x));
  return out;
}

template <class T>
std::vector<T> run_epilogue(Problem& problem, EpilogueInputs const& in, DType dtype) {
  LinearParams& p = problem.p;
  auto const gate = as_type<T>(in.gate), residual = as_type<T>(in.residual);
  std::vector<T> out(size_t(p.m * p.n), T(NAN));
  LinearEpilogue& e = p.epilogue;
  e.x_scale = in.x_scale.data(), e.x_sum = in.x_sum.data();
  e.weight_scale = in.scale.data(), e.weight_zero = in.zero.data(), e.bias = in.bias.data();
  e.gate = gate.data(), e.stride_gate = {p.n, 0}, e.gate_dtype = dtype;
  e.residual = residual.data(), e.stride_residual = {in.kBatch * p.n, p.n};
  e.rows_per_batch = in.kBatch;
  e.out = out.data(), e.out_dtype = dtype;
  run_tile(p, true);
  return out;
}

template <class T>
void expect_rounded(Problem& problem, EpilogueInputs const& in, DType dtype,
                    std::vector<float> const& exact) {
  auto const out = run_epilogue<T>(problem, in, dtype);
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT(static_cast<float>(out[i]) == static_cast<float>(T(exact[i])));
  }
}

// Scales, zero points, bias, gate and residual, in fp32, which the types of two bytes round.
void test_epilogue() {
  Shape const s{150, 72, 96};
  EpilogueInputs const in(s);
  for (Format format : {Format::kInt8, Format::kNibblePlanes}) {
    Problem problem(format, 0, s);
    auto const out = run_epilogue<float>(problem, in, DType::kFloat32);
    for (size_t i = 0; i < out.size(); ++i) {
      size_t const row = i / size_t(s.n), column = i % size_t(s.n);
      double const sum =
          static_cast<double>(problem.sums[i]) + double(in.zero[column]) * static_cast<double>(in.x_sum[row]);
      double y = sum * in.x_scale[row] * in.scale[column] + in.bias[column];
      y = y * in.gate[row / size_t(in.kBatch) * size_t(s.n) + column] + in.residual[i];
      EXPECT(std::fabs(out[i] - y) <= 1e-5 * std::fabs(y) + 1e-3);
    }
    expect_rounded<cute::half_t>(problem, in, DType::kFloat16, out);
    expect_rounded<cute::bfloat16_t>(problem, in, DType::kBFloat16, out);
  }
}

// No rows of bytes past the output are written, in two-byte types as in others.
template <class T>
void test_rounding(DType dtype) {
  Shape const s{33, 41, 32};  // nothing is wide
  Problem problem(Format::kInt4, 0, s);
  std::vector<T> out(size_t(s.m * s.n) + 64, T(7.f));
  problem.p.epilogue.out = out.data();
  problem.p.epilogue.out_dtype = dtype;
  problem.p.epilogue.rows_per_batch = s.m;
  run_tile(problem.p, true);
  for (size_t i = 0; i < out.size(); ++i) {
    float const expected = i < problem.sums.size() ? static_cast<float>(problem.sums[i]) : 7.f;
    EXPECT(static_cast<float>(out[i]) == static_cast<float>(T(expected)));
  }
}

void test_refused() {
  Problem problem(Format::kInt4, 0, {4, 8, 32});
  LinearParams p = problem.p;
  p.k = 24;
  EXPECT(!can_run_linear_sm90(p));
  p = problem.p, p.x += 8;
  EXPECT(!can_run_linear_sm90(p));
  p = problem.p, p.stride_x = 40;
  EXPECT(!can_run_linear_sm90(p));
  p = problem.p, p.m = 2, p.stride_x = 0;  // one row, expanded
  EXPECT(!can_run_linear_sm90(p));
  p = problem.p, p.k = 65552;
  EXPECT(!can_run_linear_sm90(p));
  p = problem.p, p.m = 0;
  run_linear_sm90(p, nullptr);  // nothing to do
}

// Many rows get the large tile, and few the one that keeps more multiprocessors busy; the choice prints
// itself.
void test_tile() {
  LinearParams p;
  p.m = 75600, p.n = p.k = 5120;
  LinearTileSm90 const large = pick_linear_tile_sm90(p, 132);
  EXPECT(large.tokens == 256 && large.outputs == 160);
  EXPECT(large.group == 12);  // 12 x 256 rows of 5,120 bytes are within 16 MiB
  EXPECT(large.to_string() ==
         "linear sm90: int8, 256 tokens x 160 outputs, 4 stages of 128, tokens by 12 tiles");
  p.m = 512, p.n = 1536;
  EXPECT(pick_linear_tile_sm90(p, 132).tokens == 128);
  p.format = Format::kTable;
  EXPECT(pick_linear_tile_sm90(p, 132).tokens == 64);
}

}  // namespace
}  // namespace vdit

int main(int, char** argv) {
  using namespace vdit;
  return run_case(
      {
          {"int8", [] { test_shapes(Format::kInt8, 0); }},
          {"int4", [] { test_shapes(Format::kInt4, 0); }},
          {"planes", [] { test_shapes(Format::kNibblePlanes, 0); }},
          {"table8", [] { test_shapes(Format::kTable, 8); }},
          {"table16", [] { test_shapes(Format::kTable, 16); }},
          {"extremes", test_extremes},
          {"epilogue", test_epilogue},
          {"rounding",
           [] {
             test_rounding<cute::half_t>(DType::kFloat16);
             test_rounding<cute::bfloat16_t>(DType::kBFloat16);
             test_rounding<float>(DType::kFloat32);
           }},
          {"refused", test_refused},
          {"tile", test_tile},
      },
      argv[1]);
}
