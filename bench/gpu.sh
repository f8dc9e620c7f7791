#!/usr/bin/env bash
# Everything that a GPU is needed for, within ten minutes: build, check every CUDA kernel, time, summarise.
#
#   bench/gpu.sh [--dry-run] [--libraries DIR] [--wheels DIR] [--arch ARCH] [--seconds N] [--out DIR]
#
#   --libraries DIR  op libraries that are built already (libvdit_cpu.so and the rest); skips the build.
#                    VDIT_LIBRARY_DIR in the environment means the same.
#   --wheels DIR     wheels of pybind11 and nvidia-cutlass for the build, where they are not installed.
#   --arch ARCH      CUDA architecture to build for (default: that of the first GPU).
#   --seconds N      time for everything (default 570).
#   --out DIR        where logs and results go (default: $OUT, else bench/results).
#
# Nothing is downloaded. Every stage runs under a timeout, a failed stage does not stop the next one (but for a
# library that does not load), and the last lines are the summary. Needs: torch with CUDA; for the build also nvcc, cmake, g++.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=0 libraries=${VDIT_LIBRARY_DIR:-} wheels= arch= total=570 out=${OUT:-bench/results}
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --libraries) libraries=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --arch) arch=$2; shift ;;
    --seconds) total=$2; shift ;;
    --out) out=$2; shift ;;
    -h|--help) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "gpu.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift
done

python=${PYTHON:-python3}
work=${VDIT_GPU_BUILD_DIR:-build/gpu}
begun=$SECONDS
stages=() states=() taken=()
# A folder named absolutely stays valid whatever a stage does.
[ -n "$libraries" ] && libraries=$(realpath -m "$libraries")
[ -n "$wheels" ] && wheels=$(realpath -m "$wheels")
out=$(realpath -m "$out")
[ "$dry_run" = 1 ] || mkdir -p "$out" "$work"

# stage NAME LIMIT COMMAND...: run under a timeout, log to $out/NAME.log, remember how it ended.
stage() {
  local name=$1 limit=$2 left status started
  shift 2
  left=$((total - (SECONDS - begun)))
  if [ "$dry_run" = 1 ]; then
    printf 'stage %-22s limit %4d s: %s\n' "$name" "$limit" "$*"
    return 0
  fi
  stages+=("$name")
  if [ "$left" -lt 5 ]; then
    states+=("not run: out of time") taken+=(0)
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  printf '\n== %s (at most %d s, %d s left)\n' "$name" "$limit" "$left"
  started=$SECONDS
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  taken+=($((SECONDS - started)))
  case $status in
    0) states+=("ok") ;;
    124|137) states+=("stopped after $limit s") ;;
    *) states+=("failed ($status)") ;;
  esac
  printf -- '-- %s: %s, %d s\n' "$name" "${states[-1]}" "${taken[-1]}"
  return "$status"
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,memory.total --format=csv || true
  nproc
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda); print("GPU seen by torch:", torch.cuda.is_available() and torch.cuda.get_device_name())'
  for tool in nvcc cmake ninja g++; do printf '%s: ' "$tool"; command -v "$tool" || echo missing; done
}

gpu_arch() {
  local found
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d '. ')
  case ${found:-90} in
    90) echo 90a-real ;;
    *) echo "${found}-real" ;;
  esac
}

build() {
  set -e
  local generator=() site
  site=$(realpath -m "$work")/site
  if [ -n "$wheels" ]; then
    # Unpacked beside the build: nothing is installed into the machine's Python.
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" pybind11 nvidia-cutlass
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  fi
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$work" "${generator[@]}" -DVDIT_CUDA=ON -DVDIT_CUDA_ARCHS="${arch:-$(gpu_arch)}" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build "$work" -j "$(nproc)" --target vdit_cpu vdit_cuda
}

loads() {
  "$python" - <<'EOF'
import importlib.util, sys
if importlib.util.find_spec("vdit_ext") is None:
    sys.path.insert(0, "python")
from vdit_ext import ops
print(ops.LIBRARIES)
sys.exit(ops.LIBRARIES["cuda"] != "loaded")
EOF
}

export -f environment build loads gpu_arch
export python work wheels arch

stage environment 60 bash -c environment

if [ -z "$libraries" ]; then
  stage build 300 bash -c build
  libraries=$(realpath -m "$work/csrc")
fi
export VDIT_LIBRARY_DIR=$libraries
# Without the library nothing below can run; what is left is the summary.
usable=1
stage loads 60 bash -c loads || usable=0

# --- correctness: one line a family ---
CHECKS=(
  "attention"
)
for family in "${CHECKS[@]}"; do
  [ "$usable" = 1 ] || break
  stage "check_$family" 200 "$python" bench/check_cuda.py --family "$family" --large --seconds 190 --out "$out/check_$family.json"
done

# The kernels for compute capability 9.0 run on request until they have passed here.
sm90=0
if [ "$usable" = 1 ] && [[ ${arch:-$(gpu_arch)} == 90* ]]; then
  VDIT_ATTENTION_KERNEL=sm90 stage check_attention_sm90 100 "$python" bench/check_cuda.py --family attention \
    --op block_sparse_attention --seconds 90 --out "$out/check_attention_sm90.json" && sm90=1
fi

# --- timings: "name limit arguments of bench/run.py" ---
TIMINGS=(
  "attention-moderate 100 attention --ops block_sparse_attention --seqlen 8192 --heads 8 --seconds 3 --flex-seconds 30"
  "attention-hunyuan 100 attention --ops block_sparse_attention --shape hunyuan --seconds 12 --min-rounds 3"
  "attention-wan14b 75 attention --ops block_sparse_attention --shape wan14b --seconds 8 --min-rounds 3"
  "attention-cogvideox 60 attention --ops block_sparse_attention --shape cogvideox --seconds 5 --min-rounds 3"
  "planner-hunyuan 60 attention --ops merge_attention,permute_rows,unpermute_rows,mean_pool_blocks,kmeans_assign,label_sort,segment_mean,topk_blocks,topp_blocks --shape hunyuan --seconds 4"
  "svg2-hunyuan 60 attention --ops svg2 --shape hunyuan --seconds 5 --min-rounds 3"
)
date=$(date -u +%Y-%m-%d)
for line in "${TIMINGS[@]}"; do
  [ "$usable" = 1 ] || break
  read -r name limit arguments <<< "$line"
  # shellcheck disable=SC2086  # the arguments are words
  stage "$name" "$limit" "$python" bench/run.py $arguments --device cuda --out "$out" --name "${date}_gpu_$name"
done
if [ "$sm90" = 1 ]; then
  export VDIT_ATTENTION_KERNEL=sm90
  for line in "${TIMINGS[@]:0:3}"; do  # attention alone
    read -r name limit arguments <<< "$line"
    # shellcheck disable=SC2086
    stage "$name-sm90" "$limit" "$python" bench/run.py $arguments --device cuda --out "$out" --name "${date}_gpu_$name-sm90"
  done
fi
[ "$dry_run" = 1 ] && exit 0

summary() {
  printf '\n== summary (%d s)\n' $((SECONDS - begun))
  for i in "${!stages[@]}"; do printf '%-22s %5d s  %s\n' "${stages[$i]}" "${taken[$i]}" "${states[$i]}"; done
  "$python" bench/summary.py "$out"
}
summary 2>&1 | tee "$out/summary.txt"
for state in "${states[@]}"; do [ "$state" = ok ] || exit 1; done
