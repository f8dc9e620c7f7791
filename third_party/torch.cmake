# Torch's headers and library names, without find_package(Torch): that would overwrite the CUDA architectures
# and pull in what the stable ABI exists to avoid.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u, importlib.metadata as m; print(u.find_spec('torch').submodule_search_locations[0]); print(m.version('torch'))"
  OUTPUT_VARIABLE VDIT_TORCH_FACTS RESULT_VARIABLE VDIT_TORCH_STATUS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT VDIT_TORCH_STATUS EQUAL 0)
  message(FATAL_ERROR "vdit_ext: torch (2.11 or newer, for its headers) must be importable by ${Python_EXECUTABLE}, it is not; install it or build with pip, which does so")
endif()
string(REPLACE "\n" ";" VDIT_TORCH_FACTS "${VDIT_TORCH_FACTS}")
list(GET VDIT_TORCH_FACTS 0 VDIT_TORCH_DIR)
list(GET VDIT_TORCH_FACTS 1 VDIT_TORCH_VERSION)

add_library(vdit_torch INTERFACE)
target_include_directories(vdit_torch SYSTEM INTERFACE ${VDIT_TORCH_DIR}/include)
# The ABI floor: nothing newer than torch 2.11 is called, so every torch from there on can load the library.
target_compile_definitions(vdit_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(vdit_torch INTERFACE ${VDIT_TORCH_DIR}/lib)
target_link_libraries(vdit_torch INTERFACE torch_cpu)

# libtorch.so is what brings libtorch_cuda.so in, where that symbol of the current stream lives; a CPU build
# of torch, against which this may well be linked, has neither the library nor the symbol.
add_library(vdit_torch_cuda INTERFACE)
target_link_libraries(vdit_torch_cuda INTERFACE vdit_torch -Wl,--no-as-needed torch -Wl,--as-needed)
target_compile_definitions(vdit_torch_cuda INTERFACE USE_CUDA)
