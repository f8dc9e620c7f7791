// What C++ callers of the linear and the vq family are told before anything is launched, and an epilogue
// whose one batch is longer than 32 bits hold.
//
//   refused_sm80 CASE
#include <string>
#include <vector>

#include "case.h"
#include "linear/linear_sm80.cu"
#include "linear/quantize_sm80.cu"
#include "vq/assign_sm80.cu"
#include "vq/dequantize_sm80.cu"
#include "vq/vq_sm80.cu"

namespace vdit {

// The products' kernels are left out here.
void launch_linear_int8_sm80(LinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_linear_int4_sm80(LinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_linear_planes_sm80(LinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_linear_table_sm80(LinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_vq_int8_sm80(VqLinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_vq_bf16_sm80(VqLinearParams const&, void*) { throw std::runtime_error("launched"); }
void launch_vq_fp16_sm80(VqLinearParams const&, void*) { throw std::runtime_error("launched"); }

namespace {

alignas(16) char memory[4096];

template <class F>
void expect_said(std::string const& words, F const& call) {
  try {
    call();
  } catch (std::exception const& problem) {
    if (std::string(problem.what()).find(words) != std::string::npos) return;
    throw std::runtime_error(std::string("said: ") + problem.what() + "; expected: " + words);
  }
  throw std::runtime_error("nothing was said; expected: " + words);
}

void test_linear() {
  LinearParams p;
  p.x = reinterpret_cast<int8_t*>(memory), p.weight = memory;
  p.m = p.n = 8, p.k = p.stride_x = p.stride_weight = 32;
  auto const run = [&] { run_linear_sm80(p, nullptr); };
  expect_said("launched", run);
  p.n = int64_t{1} << 31;
  expect_said(
      "vdit::linear: on CUDA there must be fewer than 2^31 rows and output channels, got 8 and 2147483648.",
      run);
  p.n = 8, p.format = WeightFormat::kTable, p.table_size = 16;
  p.table = reinterpret_cast<int8_t*>(memory + 4);
  expect_said("entries a row at a multiple of 8 bytes", run);
}

void test_expand() {
  ExpandWeightParams p;
  p.weight = memory, p.out = reinterpret_cast<int8_t*>(memory);
  p.n = 8, p.k = 40, p.stride_out = 32;
  auto const run = [&] { run_expand_weight_sm80(p, nullptr); };
  expect_said("vdit::expand: rows of out must hold the 40 channels, one or more, got a stride of 32.", run);
  p.stride_out = 48, p.weight = memory + 8;
  expect_said("vdit::expand: tiles of codes must start at multiples of 16 bytes", run);
}

void test_quantize() {
  QuantizeRowsParams p;
  p.batch = p.tokens = 1, p.channels = 16, p.stride_codes = 16, p.q_max = 128;
  expect_said(
      "vdit::quantize_rows: 1 to 65,536 channels and codes of at most 1 to 127 were expected, got 16 and "
      "128.",
      [&] { run_quantize_rows_sm80(p, nullptr); });
}

void test_vq() {
  VqLinearParams p;
  p.x = p.codes = p.codebook = memory;
  p.m = int64_t{1} << 31, p.n = 8, p.k = p.stride_x = 32;
  auto const run = [&] { run_vq_linear_sm80(p, nullptr); };
  expect_said(
      "vdit::vq_linear: on CUDA there must be fewer than 2^31 rows and output channels, got 2147483648", run);
  p.m = 8;
  expect_said("launched", run);
  VqDequantizeParams d;
  d.codes = memory + 8, d.codebook = d.out = memory, d.n = 8, d.k = d.stride_out = 64;
  expect_said("vdit::vq_dequantize: codes must start at a multiple of 16 bytes",
              [&] { run_vq_dequantize_sm80(d, nullptr); });
  d.k = 65;
  expect_said("vdit::vq_dequantize: rows of out must hold the 65 channels",
              [&] { run_vq_dequantize_sm80(d, nullptr); });
  VqAssignParams a;
  a.num_vectors = 1, a.num_codewords = 2, a.dim = 4, a.count = 3;
  expect_said(
      "vdit::vq_assign: 1 to 16 dimensions and a count of 1 to 8, of as many codewords, were expected, got 4 "
      "dimensions and the nearest 3 of 2.",
      [&] { run_vq_assign_sm80(a, nullptr); });
}

// 2^33 rows a batch are 0 in 32 bits.
void test_batch() {
  int64_t const m = 3, n = 8;
  std::vector<float> product(24), gate(24), out(24);
  for (int i = 0; i < 24; ++i) product[size_t(i)] = float(i), gate[size_t(i)] = float(i % 5);
  VqLinearParams p;
  p.m = m, p.n = n, p.dtype = DType::kFloat32;
  p.epilogue.gate = gate.data(), p.epilogue.stride_gate = {0, n}, p.epilogue.gate_dtype = DType::kFloat32;
  p.epilogue.out = out.data(), p.epilogue.out_dtype = DType::kFloat32;
  p.epilogue.rows_per_batch = int64_t{1} << 33;
  run_vq_finish_sm80(p, product.data(), nullptr);
  for (int i = 0; i < 24; ++i) EXPECT(out[size_t(i)] == float(i * (i % 5)));
}

}  // namespace
}  // namespace vdit

int main(int, char** argv) {
  using namespace vdit;
  return run_case({{"linear", test_linear},
                   {"expand", test_expand},
                   {"quantize", test_quantize},
                   {"vq", test_vq},
                   {"batch", test_batch}},
                  argv[1]);
}
