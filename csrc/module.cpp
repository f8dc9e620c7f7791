// _C: host-side facts that are not tensor ops. Imported only where it is used, because it alone ties a build
// to a Python version.
#include <pybind11/pybind11.h>

#include "common/cpu/isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-side facts of vdit_ext: build info and the CPU instruction set in use.";
  m.def("build_info", &build_info,
        "What this build was made with: version, op_namespace, compiler, build_type, torch_headers, cuda (None "
        "when built without nvcc), cuda_archs, cutlass.");
  m.def("cpu_isa", &vdit::cpu_isa,
        "Instruction set of the CPU kernels: portable, avx2, avx512 or avx512_bf16. Raises RuntimeError when "
        "VDIT_CPU_ISA names one that is unknown or not supported here.");
}
