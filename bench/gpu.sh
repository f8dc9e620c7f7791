#!/usr/bin/env bash
# Everything that a GPU is needed for, within ten minutes: build, check every CUDA kernel, time, summarise.
#
#   bench/gpu.sh [--dry-run] [--only LIST] [--libraries DIR] [--wheels DIR] [--fa3 DIR] [--arch ARCH]
#                [--seconds N] [--out DIR]
#
#   --only LIST      comma-separated parts, in this order: check, figures, resources, layer, sanitizer, timings,
#                    counters. Default: all of them, as far as the time goes; three calls do them in full:
#                      --only check,figures,resources    --only layer,sanitizer    --only timings,counters
#   --libraries DIR  op libraries that are built already (libvdit_cpu.so and the rest); skips the build.
#                    VDIT_LIBRARY_DIR in the environment means the same.
#   --wheels DIR     wheels to unpack beside the build: pybind11 and nvidia-cutlass for it, diffusers for the layer,
#                    peers (bench/README.md names them).
#   --fa3 DIR        FlashAttention-3 as a peer: what build_fa3.sh built, or a checkout of flash-attention for it.
#   --arch ARCH      CUDA architecture to build for (default: that of the first GPU).
#   --seconds N      time for everything (default 570).
#   --out DIR        where logs and results go (default: $OUT, else bench/results).
#
# Nothing is downloaded. Every stage runs under a timeout, a failed stage does not stop the next one (but for a
# library that does not load), and the last lines are the summary, the table of figures last. A stage whose tool is
# missing or not permitted is skipped with the reason. Needs: torch with CUDA; for the build also nvcc, cmake, g++.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=check,figures,resources,layer,sanitizer,timings,counters
dry_run=0 only=$PARTS libraries=${VDIT_LIBRARY_DIR:-} wheels= fa3= arch= total=570 out=${OUT:-bench/results}
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=1 ;;
    --only) only=$2; shift ;;
    --libraries) libraries=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    --fa3) fa3=$2; shift ;;
    --arch) arch=$2; shift ;;
    --seconds) total=$2; shift ;;
    --out) out=$2; shift ;;
    -h|--help) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
    *) echo "gpu.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
for part in ${only//,/ }; do
  case ",$PARTS," in
    *",$part,"*) ;;
    *) echo "gpu.sh: --only takes parts among $PARTS, got $part" >&2; exit 2 ;;
  esac
done

# Ops with kernels of their own for compute capability 9.0.
sm90_ops=block_sparse_attention,kmeans_assign,block_mass,block_mass_topk
sm90_linear_ops=w8a8_linear,w4a8_linear,log4a8_linear
sm90_vq_ops=vq_linear
python=${PYTHON:-python3}
work=$(realpath -m "${VDIT_GPU_BUILD_DIR:-build/gpu}")
begun=$SECONDS
stages=() states=() taken=()
# A folder named absolutely stays valid whatever a stage does.
[ -n "$libraries" ] && libraries=$(realpath -m "$libraries")
[ -n "$wheels" ] && wheels=$(realpath -m "$wheels")
[ -n "$fa3" ] && fa3=$(realpath -m "$fa3")
out=$(realpath -m "$out")
[ "$dry_run" = 1 ] || mkdir -p "$out" "$work"
SKIPPED=77 FINDINGS=9

# stage NAME LIMIT COMMAND...: run under a timeout, log to $out/NAME.log, remember how it ended.
stage() {
  local name=$1 limit=$2 left status started
  shift 2
  left=$((total - (SECONDS - begun)))
  if [ "$dry_run" = 1 ]; then
    printf 'stage %-24s limit %4d s: %s%s\n' "$name" "$limit" "${VDIT_ATTENTION_KERNEL:+VDIT_ATTENTION_KERNEL=$VDIT_ATTENTION_KERNEL }" "$*"
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
    "$SKIPPED") states+=("skipped: $(tail -n 1 "$out/$name.log")") ;;
    "$FINDINGS") states+=("findings: read $name.log") ;;
    124|137) states+=("stopped after $limit s") ;;
    *) states+=("failed ($status)") ;;
  esac
  printf -- '-- %s: %s, %d s\n' "$name" "${states[-1]}" "${taken[-1]}"
  return "$status"
}

# wanted PART: was it asked for, and is there a library to run it with?
wanted() { [ "$usable" = 1 ] && [[ ",$only," == *",$1,"* ]]; }

environment() {
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,memory.total --format=csv || true
  nproc
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda); print("GPU seen by torch:", torch.cuda.is_available() and torch.cuda.get_device_name())'
  for tool in nvcc cmake ninja g++ cuobjdump compute-sanitizer ncu; do printf '%s: ' "$tool"; command -v "$tool" || echo missing; done
  for module in diffusers flash_attn flash_attn_interface flash_attn.cute flashinfer block_sparse_attn svg triton; do
    printf '%s: ' "$module"
    "$python" -c 'import importlib, sys; importlib.import_module(sys.argv[1]); print("here")' "$module" 2> /dev/null || echo missing
  done
}

unpack() {
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" "$wheels"/*.whl
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
  local generator=()
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S . -B "$work" "${generator[@]}" -DVDIT_CUDA=ON -DVDIT_CUDA_ARCHS="${arch:-$(gpu_arch)}" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build "$work" -j "$(nproc)" --target vdit_cpu vdit_cuda
}

loads() {
  "$python" - <<'PROGRAM'
import importlib.util, sys
if importlib.util.find_spec("vdit_ext") is None:
    sys.path.insert(0, "python")
from vdit_ext import ops
print(ops.LIBRARIES)
sys.exit(ops.LIBRARIES["cuda"] != "loaded")
PROGRAM
}

# sanitize TOOL: NVIDIA's checker over small cases of every op, in a process a family and without torch's memory cache,
# which would hide accesses past the end of a tensor. With sm90, the ops that have kernels of their own for it.
sanitize() {
  local found=0 line family select status
  for line in "attention ^(?!plan |cuda_graph |stream )(?!.*(S=4096|S=4000|=5000|20000|300x1000|two runs))" \
    "linear ^(?!cuda_graph |sizes )(?!.*(65536|13824|20480|32784))" "vq ^(?!.*(20011|1536x1536|m300|m4096))"; do
    read -r family select <<< "$line"
    sanitize_family "$1" "$family" "$select"
    status=$?
    [ "$status" = 0 ] || [ "$status" = "$FINDINGS" ] || return "$status"
    [ "$status" = 0 ] || found=$status
  done
  return "$found"
}

sanitize_family() {
  local tool=$1 family=$2 select=$3 filter=() cases=(--per-op 6)
  [ "${VDIT_LINEAR_KERNEL:-}:$family" = sm90_always:linear ] && cases=(--op "$sm90_linear_ops" --per-op 8)
  [ "${VDIT_VQ_KERNEL:-}:$family" = sm90_always:vq ] && cases=(--op "$sm90_vq_ops" --per-op 8)
  [ "${VDIT_ATTENTION_KERNEL:-}:$family" = sm90:attention ] && cases=(--op "$sm90_ops" --per-op 8)
  echo "compute-sanitizer $tool on $family, attention kernel ${VDIT_ATTENTION_KERNEL:-by default}"
  if [ "$tool" = racecheck ]; then
    echo "NOTE: racecheck does not follow raw bulk copies (cp.async.bulk, TMA) that complete on an mbarrier, and"
    echo "reports hazards between the copy and its readers. Such reports on the sm90 kernel's tiles are known to be"
    echo "false; they are left in below, and everything else in this log is to be taken seriously."
  fi
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not here"
    return "$SKIPPED"
  fi
  # Our kernels alone: torch's own would take most of the time.
  compute-sanitizer --help | grep -q -- --kernel-name && filter=(--kernel-name kns=_ZN4vdit)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode "$FINDINGS" "${filter[@]}" \
    "$python" bench/check_cuda.py --worker --family "$family" "${cases[@]}" --select "$select"
}

# counters: what the profiler says of one call of the attention kernel.
counters() {
  local log
  if ! command -v ncu > /dev/null; then
    echo "ncu is not here"
    return "$SKIPPED"
  fi
  log=$(mktemp)
  ncu --clock-control none --kernel-name-base demangled --kernel-name regex:BlockSparseAttentionKernel \
    --launch-skip 1 --launch-count 1 --section SpeedOfLight --section LaunchStats --section Occupancy \
    --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis --section WarpStateStats \
    "$python" bench/one_call.py "$@" 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]}
  if grep -q 'ERR_NVGPUCTRPERM\|Failed to initialize the profiler' "$log"; then
    echo "the hardware counters may not be read here"
    return "$SKIPPED"
  fi
  return "$status"
}

export -f environment unpack build loads gpu_arch sanitize sanitize_family counters
export sm90_ops sm90_linear_ops sm90_vq_ops python work wheels arch SKIPPED FINDINGS

if [ -n "$wheels" ]; then
  # Unpacked beside the build: nothing is installed into the machine's Python.
  stage wheels 60 bash -c unpack
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
if [ -n "$fa3" ]; then
  if [ ! -d "$fa3/flash_attn_3" ]; then
    stage fa3 240 bash bench/build_fa3.sh "$fa3" "$work/fa3"
    fa3=$work/fa3
  fi
  export PYTHONPATH=$fa3${PYTHONPATH:+:$PYTHONPATH}
fi
stage environment 60 bash -c environment

if [ -z "$libraries" ]; then
  stage build 300 bash -c build
  libraries=$work/csrc
fi
export VDIT_LIBRARY_DIR=$libraries
# Without the library nothing below can run; what is left is the summary.
usable=1
stage loads 60 bash -c loads || usable=0

# Which attention kernels this GPU has; the one for compute capability 9.0 is what the figures are about.
kernels=(sm80)
[[ ${arch:-$(gpu_arch)} == 90* ]] && kernels=(sm90 sm80)

# --- correctness: one line a family ---
CHECKS=(
  "attention"
  "linear"
  "vq"
)
if wanted check; then
  for family in "${CHECKS[@]}"; do
    VDIT_ATTENTION_KERNEL=sm80 VDIT_LINEAR_KERNEL=sm80 VDIT_VQ_KERNEL=sm80 stage "check_$family" 150 \
      "$python" bench/check_cuda.py --family "$family" --large --seconds 140 --out "$out/check_$family.json"
  done
  if [ "${kernels[0]}" = sm90 ]; then
    VDIT_ATTENTION_KERNEL=sm90 stage check_attention_sm90 120 "$python" bench/check_cuda.py --family attention --large \
      --op "$sm90_ops,plan,cuda_graph,stream" --seconds 110 --out "$out/check_attention_sm90.json"
    VDIT_LINEAR_KERNEL=sm90_always stage check_linear_sm90 90 "$python" bench/check_cuda.py --family linear --large \
      --op "$sm90_linear_ops,sizes,cuda_graph" --seconds 80 --out "$out/check_linear_sm90.json"
    VDIT_VQ_KERNEL=sm90_always stage check_vq_sm90 60 "$python" bench/check_cuda.py --family vq --large \
      --op "$sm90_vq_ops" --seconds 50 --out "$out/check_vq_sm90.json"
  fi
fi

date=$(date -u +%Y-%m-%d)

# --- the figures: the first kernel with every peer there is, the other with dense peers alone ---
if wanted figures; then
  VDIT_ATTENTION_KERNEL=${kernels[0]} stage "figures-${kernels[0]}" 240 "$python" bench/run.py hopper --device cuda \
    --seconds 10 --min-rounds 3 --flex-seconds 90 --budget 200 --out "$out" --name "${date}_gpu_figures-${kernels[0]}"
  if [ "${#kernels[@]}" = 2 ]; then
    VDIT_ATTENTION_KERNEL=${kernels[1]} stage "figures-${kernels[1]}" 90 "$python" bench/run.py hopper --device cuda \
      --peers dense --no-flex --select 'rho1$|rho0.2$|rho0.25$|rho0.3$' --seconds 6 --min-rounds 3 --budget 75 \
      --out "$out" --name "${date}_gpu_figures-${kernels[1]}"
  fi
fi

# --- what the compiler made of each kernel ---
if wanted resources; then
  stage resources 60 "$python" bench/kernel_resources.py "$libraries/libvdit_kernels_cuda.so" --markdown "$out/${date}_kernels.md"
fi

# --- whole transformer layers ---
if wanted layer; then
  VDIT_ATTENTION_KERNEL=${kernels[0]} stage layer 120 "$python" bench/run.py layer --device cuda \
    --shape wan14b,hunyuan,cogvideox --seconds 8 --min-rounds 3 --budget 100 --out "$out" --name "${date}_gpu_layer"
fi

# --- NVIDIA's checkers ---
if wanted sanitizer; then
  for tool in memcheck synccheck racecheck; do
    for kernel in "${kernels[@]}"; do
      products=${kernel/sm90/sm90_always}
      VDIT_ATTENTION_KERNEL=$kernel VDIT_LINEAR_KERNEL=$products VDIT_VQ_KERNEL=$products \
        stage "sanitizer_${tool}_$kernel" 130 bash -c "sanitize $tool"
    done
  done
fi

# --- the other way to cut clusters into TMA boxes, over the same cases as in the figures ---
if wanted timings && [ "${kernels[0]}" = sm90 ]; then
  VDIT_ATTENTION_KERNEL=sm90 VDIT_ATTENTION_RUNS=overlap stage overlap-sm90 60 "$python" bench/run.py hopper \
    --device cuda --peers dense --no-flex --select '_variable_rho' --seconds 6 --min-rounds 3 --budget 45 \
    --out "$out" --name "${date}_gpu_overlap-sm90"
fi

# --- other timings: "name limit arguments of bench/run.py" ---
TIMINGS=(
  "attention-moderate 100 attention --ops block_sparse_attention --seqlen 8192 --heads 8 --seconds 3 --flex-seconds 30"
  "planner-hunyuan 60 attention --ops planner --shape hunyuan --seconds 4"
  "planner-wan14b 60 attention --ops planner --shape wan14b --seconds 4"
  "planner-cogvideox 60 attention --ops planner --shape cogvideox --seconds 4"
  "linear 240 linear --seconds 4 --min-rounds 3"
  "svg2-hunyuan 60 attention --ops svg2 --shape hunyuan --seconds 5 --min-rounds 3"
  "vq 90 vq --seconds 2 --min-rounds 3"
)
if wanted timings; then
  for line in "${TIMINGS[@]}"; do
    read -r name limit arguments <<< "$line"
    export VDIT_ATTENTION_KERNEL="${kernels[0]}" VDIT_LINEAR_KERNEL="${kernels[0]}" VDIT_VQ_KERNEL="${kernels[0]}"
    # shellcheck disable=SC2086  # the arguments are words
    stage "$name" "$limit" "$python" bench/run.py $arguments --device cuda \
      --out "$out" --name "${date}_gpu_$name"
  done
  # From how many rows on the kernels for 9.0 are the faster ones: their tiles are few where rows are.
  for kernel in "${kernels[@]}"; do
    VDIT_LINEAR_KERNEL=${kernel/sm90/sm90_always} stage "linear-rows-$kernel" 45 "$python" bench/run.py linear --device cuda \
      --shapes 16x5120x5120,64x5120x5120,256x5120x5120,1024x5120x5120 --select product --seconds 1 --min-rounds 3 \
      --out "$out" --name "${date}_gpu_linear-rows-$kernel"
  done
fi

# --- hardware counters ---
if wanted counters; then
  for kernel in "${kernels[@]}"; do
    VDIT_ATTENTION_KERNEL=$kernel stage "counters_$kernel" 60 bash -c "counters --shape hunyuan --kind b128 --density 0.1 --heads 2"
  done
fi
[ "$dry_run" = 1 ] && exit 0

summary() {
  printf '\n== summary (%d s)\n' $((SECONDS - begun))
  for i in "${!stages[@]}"; do printf '%-24s %5d s  %s\n' "${stages[$i]}" "${taken[$i]}" "${states[$i]}"; done
  "$python" bench/summary.py "$out"
}
summary 2>&1 | tee "$out/summary.txt"
for state in "${states[@]}"; do [[ $state == ok || $state == skipped:* ]] || exit 1; done
