# CUTLASS and CuTe headers from the PyPI package nvidia-cutlass.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u, importlib.metadata as m; print(u.find_spec('cutlass_library').submodule_search_locations[0]); print(m.version('nvidia-cutlass'))"
  OUTPUT_VARIABLE VDIT_CUTLASS_FACTS RESULT_VARIABLE VDIT_CUTLASS_STATUS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT VDIT_CUTLASS_STATUS EQUAL 0)
  message(FATAL_ERROR "vdit_ext: the CUDA kernels need the PyPI package nvidia-cutlass==4.2.0, it is not importable by ${Python_EXECUTABLE}; install it or build with -DVDIT_CUDA=OFF")
endif()
string(REPLACE "\n" ";" VDIT_CUTLASS_FACTS "${VDIT_CUTLASS_FACTS}")
list(GET VDIT_CUTLASS_FACTS 0 VDIT_CUTLASS_DIR)
list(GET VDIT_CUTLASS_FACTS 1 VDIT_CUTLASS_VERSION)

add_library(vdit_cutlass INTERFACE)
target_include_directories(vdit_cutlass SYSTEM INTERFACE ${VDIT_CUTLASS_DIR}/source/include)
