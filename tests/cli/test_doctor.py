"""``vdit doctor``: works anywhere, and says what is broken."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vdit_ext.cli import app, doctor
from vdit_ext.ops.attention import OPS


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_json_has_the_documented_keys():
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["healthy"] is True and report["self_check"] == "ok" and report["libraries"]["cpu"] == "loaded"
    assert {"machine", "versions", "torch", "driver", "cpu", "gpus", "build", "packages", "toy_weights"} <= set(
        report
    )
    kernels = {row["op"]: row for row in report["kernels"]}
    assert set(kernels) >= set(OPS)
    assert all(kernels[op]["cpu"] == "yes" for op in set(OPS))
    if not report["gpus"]:
        assert all(not row["cuda"].startswith("yes") for row in report["kernels"])


def test_table_names_versions_libraries_and_ops():
    result = run()
    assert result.exit_code == 0
    for word in ("torch", "driver", "instruction set", "cuda library", "toy weights", "topp_blocks", "Healthy"):
        assert word in result.stdout


def test_a_broken_cpu_library_is_an_exit_code(monkeypatch):
    monkeypatch.setattr(doctor, "_load_ops", lambda: (None, "undefined symbol: at_empty"))
    result = run()
    assert result.exit_code == 1 and "Broken: undefined symbol: at_empty" in result.stdout
    report = json.loads(run("--json").stdout)
    assert report["healthy"] is False and report["libraries"]["cpu"] == "undefined symbol: at_empty"


def test_a_wrong_kernel_is_an_exit_code(monkeypatch):
    from vdit_ext.ops import attention

    correct = attention.block_sparse_attention
    monkeypatch.setattr(
        attention, "block_sparse_attention", lambda *a, **k: (correct(*a, **k)[0] + 0.1, correct(*a, **k)[1])
    )
    result = run()
    assert result.exit_code == 1 and "off by" in result.stdout


@pytest.mark.parametrize(
    ("capability", "archs", "served"),
    [
        ((8, 0), ["80", "90a-real"], True),
        ((8, 6), ["80", "90a-real"], True),
        ((9, 0), ["80", "90a-real"], True),
        ((9, 0), ["80-real"], False),
        ((10, 0), ["80", "90a-real"], True),  # by the PTX of 80
        ((12, 0), ["90a-real"], False),
        ((7, 5), ["80", "90a-real"], False),
        ((9, 0), ["80-virtual"], True),
        ((9, 0), [], False),
    ],
)
def test_which_gpus_a_build_serves(capability, archs, served):
    gap = doctor.arch_gap(capability, archs)
    assert (gap is None) == served, gap


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "last"),
    [
        (set(), "portable"),
        (AVX2, "avx2"),
        (AVX2 - {"fma"}, "portable"),
        (AVX2 - {"f16c"} | AVX512, "portable"),
        (AVX2 | AVX512, "avx512"),
        (AVX2 | AVX512 - {"avx512dq"} | {"avx512_vnni", "avx512_bf16"}, "avx2"),
        (AVX2 | AVX512 | {"avx512_bf16"}, "avx512"),
        (AVX2 | AVX512 | {"avx512_vnni"}, "avx512_vnni"),
        (AVX2 | AVX512 | {"avx512_vnni", "avx512_bf16"}, "avx512_bf16"),
    ],
)
def test_instruction_sets_are_those_that_the_library_asks_for(flags, last):
    assert doctor._isa_levels(flags | {"sse2"})[-1] == last


def test_the_best_instruction_set_is_the_one_in_use(monkeypatch):
    if "VDIT_CPU_ISA" in os.environ:
        pytest.skip("VDIT_CPU_ISA chooses another")
    cpu = json.loads(run("--json").stdout)["cpu"]
    assert cpu["isa_used"] == cpu["isa_available"][-1]


def test_every_package_of_the_extra_is_looked_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["video"]}
    assert set(doctor.PACKAGES) == extra


def test_a_missing_driver_tool_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "nvidia-smi" in json.loads(run("--json").stdout)["driver"]


def test_a_missing_module_does_not_hide_the_rest(monkeypatch):
    monkeypatch.setitem(sys.modules, "vdit_ext._C", None)
    result = run("--json")
    assert result.exit_code == 0 and "note" in json.loads(result.stdout)["build"]


GPUS = [
    {"device": "cuda:0", "name": "A", "capability": "9.0", "memory_gib": 80.0, "served": True, "reason": "ok"},
    {
        "device": "cuda:1",
        "name": "B",
        "capability": "7.5",
        "memory_gib": 16.0,
        "served": False,
        "reason": "too old",
    },
]


@pytest.mark.parametrize(
    ("registered", "library", "gpus", "says"),
    [
        (True, "loaded", GPUS, "yes (cuda:0)"),
        (True, "loaded", GPUS[1:], "too old"),
        (True, "loaded", [], "no GPU"),
        (False, "loaded", GPUS, "no CUDA kernel"),
        (True, "not built: this wheel was made without nvcc", GPUS, "without nvcc"),
    ],
)
def test_cuda_column_says_why_not(registered, library, gpus, says):
    assert says in doctor._cuda_state(registered, library, gpus)


def test_gpus_have_a_table_of_their_own(monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda _build: GPUS)
    result = run()
    assert result.exit_code == 0 and "cuda:0" in result.stdout and "too old" in result.stdout
