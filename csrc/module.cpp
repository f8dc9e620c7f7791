// _C: host-side facts that are not tensor ops. Imported only where it is used, because it alone ties a build
// to a Python version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "attention/tile.h"
#include "common/check.h"
#include "common/cpu/isa.h"
#include "linear/path.h"
#include "linear/tile_sm90.h"
#include "vq/path.h"
#include "vq/tile_sm90.h"

namespace py = pybind11;

namespace {

py::list split(std::string const& text, char separator) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    size_t const end = std::min(text.find(separator, begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = VDIT_VERSION;
  info["op_namespace"] = VDIT_OP_NAMESPACE_NAME;
  info["compiler"] = std::string(
#if defined(__clang__)
      "clang " __clang_version__
#else
      "gcc " __VERSION__
#endif
  );
  info["build_type"] = VDIT_BUILD_TYPE;
  info["torch_headers"] = VDIT_TORCH_BUILD_VERSION;
  info["cuda"] = std::string(VDIT_CUDA_VERSION).empty() ? py::object(py::none()) : py::str(VDIT_CUDA_VERSION);
  info["cuda_archs"] = split(VDIT_CUDA_ARCHS_NAME, ',');
  info["cutlass"] =
      std::string(VDIT_CUTLASS_VERSION).empty() ? py::object(py::none()) : py::str(VDIT_CUTLASS_VERSION);
  return info;
}

template <class Tile>
py::dict describe_tile(Tile const& tile, int block_m) {
  py::dict found;
  found["block_m"] = block_m;
  found["block_n"] = tile.block_n;
  found["stages"] = tile.stages;
  found["threads"] = tile.threads();
  found["smem_bytes"] = tile.smem_bytes();
  found["text"] = tile.to_string();
  return found;
}

py::dict attention_tile(int32_t head_dim, int64_t seqlen_q, int32_t q_block_size, int64_t num_q_clusters,
                        int compute_capability) {
  if (compute_capability == 90) {
    vdit::check_cuda_head_dim(head_dim);
    vdit::AttentionTileSm90 const tile = vdit::attention_tile_sm90(head_dim);
    return describe_tile(tile, tile.block_m());
  }
  vdit::BlockSparseAttentionParams p;
  int32_t const offsets = 0;  // only whether there are any matters
  p.head_dim = head_dim;
  p.seqlen_q = seqlen_q;
  p.q_block_size = q_block_size;
  p.num_q_blocks = num_q_clusters;
  p.q_offsets = num_q_clusters > 0 ? &offsets : nullptr;
  vdit::AttentionTile const tile = vdit::pick_tile(p);
  return describe_tile(tile, tile.block_m);
}

vdit::WeightFormat weight_format(std::string const& name) {
  for (vdit::WeightFormat format : {vdit::WeightFormat::kInt8, vdit::WeightFormat::kInt4,
                                    vdit::WeightFormat::kNibblePlanes, vdit::WeightFormat::kTable}) {
    if (name == vdit::format_name(format)) return format;
  }
  throw std::runtime_error(
      "vdit::linear_path: weight_format must be int8, int4, nibble planes or table, got '" + name + "'.");
}

// As asked, else those of an H200 or of an A100.
int multiprocessors_of(char const* op, std::optional<int> asked, int compute_capability) {
  int const count = asked.value_or(compute_capability == 90 ? 132 : 108);
  VDIT_CHECK(count >= 1, op, "multiprocessors must be at least 1, got ", count, ".");
  return count;
}

vdit::GemmKernelChoice linear_kernel(vdit::LinearParams const& p, bool sm90, int multiprocessors) {
  return sm90 ? vdit::choose_linear_kernel_sm90(p, multiprocessors) : vdit::GemmKernelChoice{80};
}

py::dict linear_path(int64_t m, int64_t n, int64_t k, std::string const& format, int32_t table_size,
                     std::string const& path, int compute_capability, std::optional<int> asked_processors) {
  bool const sm90 = compute_capability == 90;
  int const multiprocessors = multiprocessors_of("linear_path", asked_processors, compute_capability);
  vdit::LinearParams p;
  p.m = m, p.n = n, p.k = k;
  p.format = weight_format(format);
  p.table_size = table_size;
  vdit::LinearPath const chosen =
      vdit::linear_path(m, n, k, p.format, table_size, vdit::path_request(path, "linear_path"),
                        linear_kernel(p, sm90, multiprocessors).kernel);
  if (chosen.expand) p.format = vdit::WeightFormat::kInt8;
  vdit::GemmKernelChoice const choice = linear_kernel(p, sm90, multiprocessors);
  py::dict found;
  found["path"] = chosen.expand ? "expand" : "fused";
  found["expand_cost"] = chosen.expand_cost;
  found["fused_cost"] = chosen.fused_cost;
  found["scratch_bytes"] = chosen.expand ? chosen.scratch_bytes : 0;
  found["text"] = chosen.to_string() + (sm90 ? "; " + choice.to_string() : "");
  found["kernel"] = choice.kernel;
  found["tile"] = choice.kernel == 90 ? vdit::pick_linear_tile_sm90(p, multiprocessors).to_string()
                                      : vdit::picked_tile(p, multiprocessors).to_string();
  return found;
}

// Of the product that looks words up, or of an int8 weight's if it is expanded.
vdit::GemmKernelChoice vq_kernel(vdit::VqLinearParams const& p, bool expand, bool sm90, int multiprocessors) {
  if (!sm90 || !p.is_int8) return {80};
  if (!expand) return vdit::choose_vq_kernel_sm90(p, multiprocessors);
  vdit::LinearParams expanded;
  expanded.m = p.m, expanded.n = p.n, expanded.k = p.k;
  return vdit::choose_linear_kernel_sm90(expanded, multiprocessors);
}

py::dict vq_path(int64_t m, int64_t n, int64_t k, bool int8, std::string const& path, int compute_capability,
                 bool sm90, std::optional<int> asked_processors) {
  int const multiprocessors = multiprocessors_of("vq_path", asked_processors, compute_capability);
  vdit::path_request(path, "vq_path");  // throws where the name is unknown
  vdit::VqLinearParams p;
  p.m = m, p.n = n, p.k = k;
  p.is_int8 = int8;
  int const kernel = vq_kernel(p, false, sm90, multiprocessors).kernel;
  vdit::VqPathChoice const choice = vdit::vq_path(m, int8, path, compute_capability, kernel);
  bool const expand = choice.path == vdit::VqPath::kExpand;
  vdit::GemmKernelChoice const product = vq_kernel(p, expand, sm90, multiprocessors);
  char const* const names[] = {"rows", "fused", "expand"};
  py::dict found;
  found["path"] = names[static_cast<int>(choice.path)];
  found["expand_cost"] = choice.expand_cost;
  found["fused_cost"] = choice.fused_cost;
  found["text"] = choice.to_string() + (sm90 && int8 ? "; " + product.to_string() : "");
  found["kernel"] = expand && !int8 ? py::object(py::none()) : py::object(py::int_(product.kernel));
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side facts of vdit_ext: build info, the CPU instruction set in use, kernel choice.";
  m.def("build_info", &build_info,
        "What this build was made with: version, op_namespace, compiler, build_type, torch_headers, cuda "
        "(None when built without nvcc), cuda_archs, cutlass.");
  m.def("cpu_isa", &vdit::cpu_isa,
        "Instruction set of the CPU kernels: portable, avx2, avx512, avx512_vnni or avx512_bf16. Raises "
        "RuntimeError when VDIT_CPU_ISA names one that is unknown or not supported here.");
  m.def(
      "attention_tile", &attention_tile, py::arg("head_dim"), py::arg("seqlen_q"), py::kw_only(),
      py::arg("q_block_size") = 128, py::arg("num_q_clusters") = 0, py::arg("compute_capability") = 80,
      "The tile that block_sparse_attention runs on CUDA for uniform query blocks of q_block_size rows, or, "
      "where num_q_clusters is not 0, for that many of any size: block_m query rows, block_n key rows a "
      "step, stages, threads, smem_bytes, and text, all of it in words. compute_capability is that of the "
      "kernel: "
      "90, or 80 for any other. Raises RuntimeError for a head_dim other than 64, 96 or 128.");
  m.def(
      "linear_path", &linear_path, py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(),
      py::arg("weight_format") = "int4", py::arg("table_size") = 16, py::arg("path") = "auto",
      py::arg("compute_capability") = 80, py::arg("multiprocessors") = py::none(),
      "How a product of m rows with a packed weight [n, k] runs on CUDA: path (\"fused\": codes are unpacked "
      "as they are multiplied, or \"expand\": unpacked to int8 first), expand_cost and fused_cost (estimated "
      "time each adds, as a fraction of the int8 product's), scratch_bytes, kernel (80 or 90), tile, and "
      "text, all of it in words. weight_format is int8, int4, nibble planes or table (of table_size 16 or "
      "8); "
      "path is what the op was given. compute_capability is 90 where VDIT_LINEAR_KERNEL=sm90 asks for the "
      "kernels for 9.0, which still leaves few rows to those for 8.0, or 80; multiprocessors are 132 and 108 "
      "by default. Raises RuntimeError for an unknown name.");
  m.def("vq_path", &vq_path, py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(), py::arg("int8") = false,
        py::arg("path") = "auto", py::arg("compute_capability") = 80, py::arg("sm90") = false,
        py::arg("multiprocessors") = py::none(),
        "How vq_linear multiplies m rows with a weight [n, k] on CUDA: path (rows, fused or expand), "
        "expand_cost and fused_cost (estimated time beyond the stock product's, as a fraction of it), kernel "
        "(80 or 90, None where torch multiplies an expanded weight), and text, all of it in words. "
        "compute_capability is the GPU's; sm90 says that VDIT_VQ_KERNEL=sm90 asks for the kernels for 9.0, "
        "which int8 words have and which still leave few rows to those for 8.0; multiprocessors as for "
        "linear_path. Raises RuntimeError for an unknown path.");
}
