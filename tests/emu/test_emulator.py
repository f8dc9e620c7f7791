"""The emulator runs right kernels exactly, in every order, and names the mistake in wrong ones."""

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
    run_sanitized,
)
from emu_toolchain import CORE, CSRC, compile_object, header_flags, run_emulated


@pytest.fixture(scope="session")
def gemm() -> Path:
    return built("gemm.cu")


@pytest.fixture(scope="session")
def instructions() -> Path:
    return built("instructions.cu")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ["bf16", "f16", "s8", "bf16_transposed"])
def test_gemm_is_exact(gemm, case, order):
    """cp.async, swizzled shared memory, ldmatrix and MMA through CuTe's tiled copies, with a ragged edge."""
    done = run_emulated(gemm, case, order=order)
    assert (done.returncode, done.stdout) == (0, "max error 0\n"), done.stderr


@pytest.mark.parametrize("bug", ["no_wait", "no_barrier_before_read", "no_barrier_after_read"])
def test_gemm_without_a_wait_or_a_barrier_is_wrong(gemm, bug):
    """Poisoned and pending shared memory turns what is missing into NaN."""
    outcomes = {order: run_emulated(gemm, bug, order=order).stdout for order in ORDERS}
    assert "max error inf\n" in outcomes.values(), outcomes
    assert outcomes["forward"] == outcomes["reverse"] == "max error inf\n"


def test_gemm_with_too_little_shared_memory_is_named(gemm):
    done = run_emulated(gemm, "short_shared")
    assert re.search(
        r"GemmKernel<.*>, block \(0, 0, 0\): thread \d+ gave cp_async_16 .* of 16320 bytes", done.stdout
    )


RIGHT = [
    "index", "shuffles", "barriers", "atomics", "ldmatrix", "cp_async", "arithmetic", "bytes", "fma_exp2",
    "f16_values", "bf16_values", "block_order", "neighbours", "after_error",
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RIGHT)
def test_instruction(instructions, case, order):
    assert_right(instructions, case, order)


HERE = r"\(instructions\.cu:\d+\)"
SENTENCES = {
    "divergent_barrier": rf"no thread can go on: threads 0-63 wait at sync_block {HERE}; threads 64-127 exited\.",
    "two_barriers": rf"thread \d+ came to sync_block\S* {HERE} while threads? [\d, -]+ waits? at sync_block",
    "mixed_collectives": rf"thread \d+ came to (ballot|shfl) {HERE} while .* waits? at (shfl|ballot) {HERE}\.",
    "two_lines": rf"thread \d+ came to shfl {HERE} while .* waits? at shfl {HERE}\.",
    "early_exit": rf"threads 0-6, 8-31 wait at shfl_xor {HERE}; threads 7, 32-63 exited\.",
    "crossed_wait": rf"threads 0-2, 4-31 wait at sync_warp {HERE}; thread 3 waits at sync_block {HERE}; "
    rf"threads 32-63 wait at sync_block {HERE}\.",
    "ldmatrix_outside": rf"thread 9 gave ldmatrix_x4 {HERE} bytes 656 to 671 of 512 bytes of shared memory\.",
    "ldmatrix_misaligned": rf"thread 15 gave ldmatrix_x2 {HERE} byte 242 of shared memory, which is not a multiple",
    "cp_async_global": rf"thread \d+ gave cp_async_16 {HERE} an address that is not in shared memory\.",
    "cp_async_misaligned": rf"thread \d+ gave cp_async_16 {HERE} a global address that is not a multiple of 16\.",
    "overrun": r"a thread wrote to byte 128 of 128 bytes of shared memory; .* names the line\.",
    "trap": r"block \(0, 1, 0\): thread 6 trapped: the plan has 3 blocks, got 4\.",
    "throw": r"^thrown in a kernel$",
    "too_much_shared": r"TrapKernel: a block needs 300000 bytes of shared memory, but .* 232448\.",
    "too_wide_grid": r"TrapKernel: the grid may be at most 2147483647 x 65535 x 65535, got 1 x 65536 x 1\.",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SENTENCES)
def test_mistake_is_named(instructions, case, order):
    """One sentence with kernel, block, collective, line and threads; never a hang."""
    starts = "" if case == "throw" else r"vdit::\w+"
    assert_names_mistake(instructions, case, SENTENCES[case], order, starts)


def test_unknown_order_is_refused(instructions):
    done = run_emulated(instructions, "index", order="sideways")
    assert "VDIT_EMU_ORDER must be forward, reverse, random or random:SEED, got 'sideways'." in done.stdout


def line_of(text: str) -> int:
    """The line of instructions.cu that holds `text`, once."""
    lines = (KERNELS / "instructions.cu").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return number


@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_right_kernels_are_silent_under_a_sanitizer(sanitize):
    cases = ["shuffles", "barriers", "atomics", "ldmatrix", "cp_async", "neighbours", "after_error"]
    assert_silent_under_sanitizer(built("instructions.cu", sanitize=sanitize), cases)


def test_address_sanitizer_names_the_overrun():
    done = run_sanitized(built("instructions.cu", sanitize="address"), "overrun")
    assert done.returncode == 66 and "heap-buffer-overflow" in done.stderr
    where = re.search(r"#0 .*OverrunKernel.*instructions\.cu:(\d+)", done.stderr)
    assert int(where[1]) == line_of("thread_idx() + (thread_idx() == 31)")


def test_thread_sanitizer_names_the_missing_barrier():
    done = run_sanitized(built("instructions.cu", sanitize="thread"), "neighbours_race")
    assert done.returncode == 66
    reported = {int(n) for n in re.findall(r"#0 .*NeighbourKernel.*instructions\.cu:(\d+)", done.stderr)}
    assert {line_of("int const first = "), line_of("first * 2;")} <= reported


def test_portable_switch_works_too(tmp_path):
    """Where there is no assembly for the machine, ucontext switches the stacks."""
    kernel = compile_object(KERNELS / "switch.cpp", ["-std=c++20", "-O1", "-DVDIT_EMU", f"-I{CSRC}"])
    core = [compile_object(CSRC / "emu" / name, ["-std=c++20", "-O1", "-DVDIT_EMU_UCONTEXT"]) for name in CORE]
    program = tmp_path / "switch"
    subprocess.run(["g++", *map(str, [kernel, *core]), "-o", str(program)], check=True)
    assert run_emulated(program, order="random").stdout == "ok\n"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("kernel", "standard"), [("gemm.cu", "c++17"), ("instructions.cu", "c++20")])
def test_nvcc_builds_the_same_source(kernel, standard):
    flags = [f"-std={standard}", "-arch=sm_80", "--expt-relaxed-constexpr", "-DVDIT_TEST_BF16_ONLY"]
    flags += [flag.replace("-isystem", "-I") for flag in header_flags(with_cuda=False)]
    compile_object(KERNELS / kernel, flags, compiler="nvcc")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("aligned", "launched"),
        ("pointer", "must start at multiples of 16 bytes"),
        ("stride", "must start at multiples of 16 bytes"),
        ("heads", "must start at multiples of 16 bytes"),
        ("dtype", "must be fp16 or bf16"),
    ],
)
def test_embedders_are_told_of_rows_that_the_kernel_cannot_load(given, told):
    assert told in run_emulated(built("misaligned.cu"), given).stdout
