#!/usr/bin/env bash
# FlashAttention-3 with as few instantiations as the benches need, as a peer: bf16, head sizes 64 and 128, forward.
#
#   bench/build_fa3.sh SOURCE FOLDER
#
#   SOURCE   a checkout of flash-attention (https://github.com/Dao-AILab/flash-attention); its submodules are not used
#   FOLDER   where flash_attn_interface.py and flash_attn_3/ go; put it on PYTHONPATH
#
# Needs torch, nvcc 12.3 or later, and CUTLASS: SOURCE/csrc/cutlass, or the package nvidia-cutlass. Its own setup.py
# downloads and compiles far more. Nothing is downloaded here. Torch's stable ABI is used: what one machine built, also
# one without a GPU, runs with another torch from 2.9 on.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
source=$(realpath "$1") folder=$(realpath -m "$2") python=${PYTHON:-python3}
here=$source/hopper
[ -f "$here/flash_api_stable.cpp" ] || { echo "build_fa3: $here/flash_api_stable.cpp was expected; give a checkout of 2025-09 or later" >&2; exit 2; }
command -v nvcc > /dev/null || { echo "build_fa3: nvcc is not here"; exit 77; }
cutlass=$source/csrc/cutlass/include
if [ ! -d "$cutlass" ]; then
  cutlass=$("$python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("cutlass_library").origin).parent / "source" / "include")')
fi
[ -d "$cutlass" ] || { echo "build_fa3: CUTLASS was expected at $cutlass" >&2; exit 2; }

off=(BACKWARD SPLIT PAGEDKV APPENDKV LOCAL SOFTCAP PACKGQA FP16 FP8 VARLEN HDIM96 HDIM192 HDIM256 SM8x HDIMDIFF64 HDIMDIFF192)
flags=(-O3 -std=c++17 -DNDEBUG -DTORCH_TARGET_VERSION=0x0209000000000000 -DPy_LIMITED_API=0x03090000 -DUSE_CUDA)
for feature in "${off[@]}"; do flags+=("-DFLASHATTENTION_DISABLE_$feature"); done
includes=("-I$here" "-I$cutlass")
while read -r path; do includes+=(-isystem "$path"); done < <("$python" - <<'PROGRAM'
import pathlib, sysconfig, torch
root = pathlib.Path(torch.__file__).parent / "include"
print(root, root / "torch/csrc/api/include", sysconfig.get_path("include"), sep="\n")
PROGRAM
)
cuda=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
for path in "$cuda/include" "$cuda/include/cccl"; do [ -d "$path" ] && includes+=(-isystem "$path"); done
device=(-gencode arch=compute_90a,code=sm_90a --use_fast_math --expt-relaxed-constexpr --expt-extended-lambda
  -DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED -DCUTLASS_ENABLE_GDC_FOR_SM90 -DCUTLASS_DEBUG_TRACE_LEVEL=0 -Xcompiler -fPIC)

mkdir -p "$folder/flash_attn_3" "$folder/objects"
pids=()
# Slowest first; an object that is newer than its source stays.
for file in instantiations/flash_fwd_hdim{128,64}_bf16_sm90.cu flash_api_stable.cpp flash_prepare_scheduler.cu; do
  object=$folder/objects/$(basename "$file").o
  [ "$object" -nt "$here/$file" ] && continue
  case $file in
    *.cu) nvcc "${flags[@]}" "${device[@]}" "${includes[@]}" -c "$here/$file" -o "$object" & ;;
    *) "${CXX:-c++}" "${flags[@]}" "${includes[@]}" -fPIC -c "$here/$file" -o "$object" & ;;
  esac
  pids+=($!)
  if [ "$(jobs -rp | wc -l)" -ge "${MAX_JOBS:-$(nproc)}" ]; then wait -n; fi
done
for pid in "${pids[@]}"; do wait "$pid"; done

torch_lib=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "lib")')
stub=$folder/objects/stub
if [ ! -f "$torch_lib/libtorch_cuda.so" ]; then
  # A torch without CUDA can still build for one with it: only the library's name is needed.
  mkdir -p "$stub"
  echo | "${CXX:-c++}" -shared -fPIC -x c++ - -Wl,-soname,libtorch_cuda.so -o "$stub/libtorch_cuda.so"
fi
# NOTE: through -Xlinker nvcc would move --no-as-needed behind the libraries that it is for.
"${CXX:-c++}" -shared -o "$folder/flash_attn_3/_C.abi3.so" "$folder"/objects/*.o -L"$torch_lib" -L"$stub" -L"$cuda/lib64" \
  -Wl,--no-as-needed -ltorch_cuda -Wl,--as-needed -ltorch_cpu -lc10 -lcudart_static -ldl -lrt -lpthread
touch "$folder/flash_attn_3/__init__.py"
cp "$here"/flash_attn_interface.py "$folder/"
# The interface asks which head sizes there are.
"$python" - "${off[@]}" > "$folder/flash_attn_config.py" <<'PROGRAM'
import sys
names = [*sys.argv[1:], *(name for name in ("HDIM64", "HDIM128") if name not in sys.argv)]
print("CONFIG =", {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": name in sys.argv for name in names}})
PROGRAM
echo "FlashAttention-3 is in $folder"
