"""Hopper's instructions in the emulator: exact in every order where used rightly, a named mistake where not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emu_programs import (
    KERNELS,
    ORDERS,
    assert_names_mistake,
    assert_right,
    assert_silent_under_sanitizer,
    built,
)
from emu_toolchain import header_flags, run_emulated


@pytest.fixture(scope="session")
def hopper() -> Path:
    return built("hopper.cu")


RIGHT = [
    "named", "arrive", "elect", "stmatrix", "registers", "tma_load", "overlap", "tma_store", "bulk_load", "map_errors",
    "products_k", "products_mn", "products_s8", "products_u8", "groups",
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RIGHT)
def test_instruction(hopper, case, order):
    assert_right(hopper, case, order)


@pytest.mark.parametrize("order", [*ORDERS, "random:3", "random:4", "random:5"])
def test_pipeline_is_exact(hopper, order):
    """TMA in and out, two stages, two consumer warpgroups, setmaxnreg, ragged in all three dimensions."""
    done = run_emulated(hopper, "pipe", order=order)
    assert (done.returncode, done.stdout) == (0, "max error 0\nok\n"), done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_accumulators_are_nan_until_waited_for(hopper, order):
    assert run_emulated(hopper, "read_early", order=order).stdout in ("read nan\nok\n", "read -nan\nok\n")


HERE = r"\(hopper\.cu:\d+\)"
SHARED = r"bytes \d+ to \d+ of 66560 bytes of shared memory"
BARRIER = rf"the mbarrier at byte \d+ of barrier_init {HERE}"
WAITING = rf"no thread can go on: .*threads 128-383 wait at barrier_wait {HERE}\. Phase"
SENTENCES = {
    # in the pipeline
    "stale_phase": rf"which changed before wgmma_wait {HERE} made it due|all 1 arrivals of phase 1 have come",
    "early_release": rf"wgmma_ss {HERE} of warpgroup [12] reads {SHARED}, which changed before wgmma_wait {HERE}",
    "few_bytes": rf"tma_load {HERE} of thread \d+ brings \d+ bytes to {BARRIER}, which expects \d+ in phase 0\.",
    "many_bytes": rf"{WAITING} 0 of {BARRIER} lacks 0 of 1 arrivals and 1024 bytes\.",
    "no_expect": rf"tma_load {HERE} bytes 0 to 16383 of .*, which tma_load {HERE} of thread \d+ is still writing"
    r"|brings \d+ bytes to .*, which expects 0 in phase",
    "many_arrivals": rf"{BARRIER} has ended phase 1 before any thread has seen the end of phase 0: more arrivals",
    "no_release": rf"{WAITING} 1 of {BARRIER} lacks 1 of 1 arrivals and 0 bytes\. Phase 0 of",
    "no_producer": r"threads 0-127 exited; threads 128-383 wait .* lacks 1 of 1 arrivals and 0 bytes\.",
    # wgmma
    "write_early": rf"wgmma_ss {HERE} of warpgroup 0 had its accumulators written by other code before wgmma_wait",
    "no_fence": rf"wgmma_ss {HERE} of warpgroup 0 comes without a wgmma_fence since",
    "no_proxy_fence": rf"wgmma_ss {HERE} of warpgroup 0 reads {SHARED}, where ordinary stores .* no fence_async_proxy",
    "overwrite": rf"wgmma_ss {HERE} of warpgroup 0 reads bytes 8192 to 8207 of .*, which changed before wgmma_wait",
    "different_lanes": r"of warpgroup 0: threads 0 and 77 differ in the descriptor of a\.",
    "half_group": rf"threads 0-95 wait at wgmma_fence {HERE}; threads 96-127 exited\.",
    "no_wait": rf"the block has ended before warpgroup 0 waited for its wgmma_ss {HERE}\.",
    "outside": rf"wgmma_ss {HERE} of warpgroup 0 reads bytes 66560 to 66575 of 66560 bytes of shared memory\.",
    # named barriers and registers
    "named_deadlock": rf"threads 0-63 wait at named_sync {HERE}; threads 64-127 exited\. To named barrier 3, 64 of 96",
    "named_counts": r"barrier 3 and (64|128) threads, while .* has given it (64|128)\.|barrier 3, 64 of 128 threads",
    "named_id": rf"named_sync {HERE} barrier 16, where 1 to 15 are possible\.",
    "named_lanes": rf"named_arrive {HERE} a barrier that differs between the lanes of a warp\.",
    "registers_deadlock": rf"threads 128-383 wait at set_max_registers_up {HERE}\. Of the block's registers, 0 are free",
    # mbarriers
    "barrier_deadlock": rf"threads 0-31 wait at barrier_wait {HERE}; threads 32-63 exited\. Phase 0 of the mbarrier "
    rf"at byte 65544 of barrier_init {HERE} lacks 2 of 3 arrivals and 512 bytes\.",
    "poll_deadlock": rf"threads 0-31 wait at barrier_try {HERE}\. Phase 0 of {BARRIER} lacks 1 of 1",
    "uninitialised": rf"barrier_wait {HERE} an mbarrier at byte 65536 that no barrier_init has set up\.",
    "init_twice": rf"thread 1 gave barrier_init {HERE} {BARRIER}, which is there already\.",
    "overwritten": rf"thread 5 gave barrier_arrive {HERE} {BARRIER}, which something else has written over\.",
    "unfenced_init": rf"bulk_load {HERE} {BARRIER} without a fence_barrier_init by the thread that set it up\.",
    "leftover": rf"ended in the middle of phase 0 of {BARRIER}, which lacks 1 of 2 arrivals and 64 bytes\.",
    "nobody_waits": rf"the block has ended before bulk_load {HERE} of thread 0, whose barrier nobody has waited for\.",
    "over_arrive": rf"barrier_arrive {HERE} {BARRIER}, where all 1 arrivals of phase 0 have come and only bytes are",
    # the copy engine
    "other_rows": rf"tma_load {HERE} bytes 640 to 1663 of .*, which tma_load {HERE} of thread 0 is still writing\.",
    "two_loads": rf"bulk_load {HERE} bytes 16 to 47 of .*, which bulk_load {HERE} of thread 0 is still writing\.",
    "load_slot": rf"tma_load {HERE} byte 64 of shared memory, which is not a multiple of 128\.",
    "load_rank": rf"tma_load {HERE} 3 coordinates for a map of rank 2\.",
    "load_copy": rf"tma_load {HERE} a TensorMap on the thread's own stack, where it must lie in Params",
    "unpublished_store": rf"tma_store {HERE} reads {SHARED}, where ordinary stores .* no fence_async_proxy\.",
    "early_fence": rf"tma_store {HERE} reads {SHARED}, where ordinary stores .* no fence_async_proxy\.",
    "reused_store": rf"tma_store {HERE} has not been waited for, but its source, bytes 0 to 1023 of .* written over\.",
    "unread_store": rf"the block has ended before thread 0 waited until its tma_store {HERE} had read shared memory\.",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SENTENCES)
def test_mistake_is_named(hopper, case, order):
    """In every order, one sentence with kernel, block, line and threads; two where a dead-lock is explained."""
    assert_names_mistake(hopper, case, SENTENCES[case], order, r"vdit::\w+, block \(\d, \d, 0\): ")


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_right_kernels_are_silent_under_a_sanitizer(sanitize):
    cases = ["named", "arrive", "stmatrix", "registers", "tma_load", "tma_store", "bulk_load", "groups"]
    assert_silent_under_sanitizer(built("hopper.cu", sanitize=sanitize), cases)


def compiled_for_hopper(kernel: str, standard: str, output: Path) -> str:
    """What nvcc and ptxas say. Not -arch=sm_90a, with which some also compile for sm_90, which lacks wgmma."""
    flags = [f"-std={standard}", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr"]
    flags += [
        "-Xptxas=-v,-warn-spills",
        *(flag.replace("-isystem", "-I") for flag in header_flags(with_cuda=False)),
    ]
    command = ["nvcc", *flags, "-c", str(KERNELS / kernel), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_takes_every_gpu_body(tmp_path):
    """Without spills, and without ptxas having to serialise a wgmma or to put fences and waits of its own in."""
    said = compiled_for_hopper("every_sm90.cu", "c++17", tmp_path / "every.o")
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == 5, said
    assert not re.search("serializ|injected|ignored|[1-9][0-9]* bytes spill|warning", said), said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_builds_the_same_source(tmp_path):
    """ptxas mends only the kernel whose mistakes are planted."""
    said = compiled_for_hopper("hopper.cu", "c++20", tmp_path / "hopper.o")
    mended = [line for line in said.splitlines() if re.search("serializ|injected|ignored|warning", line)]
    assert all("GroupsKernel" in line for line in mended), said
