"""The benches themselves: results are complete, a wrong op is never timed, the GPU script holds together."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

import bench_attention  # noqa: E402
import check_cuda  # noqa: E402
import harness  # noqa: E402
import run as bench_run  # noqa: E402
import summary  # noqa: E402

TINY = ["attention", "--device", "cpu", "--seqlen", "256", "--heads", "2", "--dtypes", "float32", "--no-flex"]
TINY += ["--seconds", "0.05", "--min-rounds", "2", "--max-rounds", "3"]


pytestmark = pytest.mark.usefixtures("quick")


def result_of(tmp_path, *extra) -> tuple[int, dict, str]:
    code = bench_run.main([*TINY, *extra, "--out", str(tmp_path), "--name", "tiny"])
    return code, json.loads((tmp_path / "tiny.json").read_text()), (tmp_path / "tiny.md").read_text()


def test_result_is_complete(tmp_path):
    code, result, page = result_of(tmp_path, "--select", "d64")
    assert code == 0
    for key in (
        "schema",
        "family",
        "date",
        "command",
        "machine",
        "versions",
        "commit",
        "load_average",
        "libraries",
        "ceilings",
    ):
        assert result[key], key
    assert {"cpu", "cores", "threads", "gpu", "niceness"} <= result["machine"].keys()
    assert {row["op"] for row in result["rows"]} == set(bench_attention.OPS)
    for row in result["rows"]:
        assert row["status"] == "timed" and row["check"] == "passed", row
        assert row["us"] > 0 and row["rounds"] == len(row["samples_us"]) >= 2
        assert any("ratio" in peer for peer in row["peers"].values()), row["op"]
        assert row["op"] in page and row["case"] in page
    attention = [row for row in result["rows"] if row["op"] == "block_sparse_attention"]
    assert all(
        row["flops"] > 0 and row["floor_us"] > 0 and row["target"]["at_most"] in (1.2, 1.4) for row in attention
    )
    assert str(tmp_path) not in page and str(ROOT) not in json.dumps(result), "no folders of this machine"


def test_density_and_work_are_those_of_the_lists(tmp_path):
    _, result, _ = result_of(tmp_path, "--ops", "block_sparse_attention", "--select", "d64_b64_rho0.5")
    (row,) = result["rows"]
    assert row["sizes"]["density"] == pytest.approx(0.5)
    assert row["flops"] == 4 * 64 * 2 * 256 * 256 * 0.5
    assert row["peers"]["SDPA x density"]["scale"] == pytest.approx(0.5)


@pytest.mark.parametrize("fault", ["wrong value", "unwritten rows", "raises"])
def test_a_wrong_op_is_not_timed(tmp_path, monkeypatch, fault):
    right = bench_attention.ops.block_sparse_attention
    calls = []

    def wrong(*args, **kwargs):
        calls.append(1)
        out, lse = right(*args, **kwargs)
        if fault == "wrong value":
            out[..., 200, 3] += 0.5
        elif fault == "unwritten rows":
            out[..., 7:9, :] = torch.nan
        else:
            raise RuntimeError("vdit::block_sparse_attention: no")
        return out, lse

    monkeypatch.setattr(bench_attention.ops, "block_sparse_attention", wrong)
    code, result, page = result_of(tmp_path, "--ops", "block_sparse_attention", "--select", "d64_b128_rho0.5")
    (row,) = result["rows"]
    assert code == 1 and row["status"] == "check failed" and "us" not in row
    assert len(calls) == 1, "called for the check and never again"
    assert "Not timed" in page and row["target"]["verdict"] == "check failed"


def test_sampled_rows_find_what_a_full_check_finds():
    q, k, v = (torch.randn(1, 2, 1000, 64) for _ in range(3))
    counts = torch.full((1, 2, 8), 3, dtype=torch.int32)
    lists = torch.tensor([[[[0, 7, 7, 99]] * 8] * 2], dtype=torch.int32)  # twice listed, tail not to be read
    kwargs = {"q_block_size": 128, "kv_block_size": 128}
    naive = bench_attention.defs.block_sparse_attention_naive(q, k, v, counts, lists, **kwargs)
    rows = bench_attention.sample_rows(1000, 32)
    check = bench_attention.RowCheck(q, k, v, counts, lists, kwargs, rows)
    check(naive)
    assert rows[0] == 0 and rows[-1] == 999
    naive[0][0, 1, 999, 5] += 1e-3
    with pytest.raises(AssertionError, match="out: absolute error"):
        check(naive)


def test_a_peer_that_computes_something_else_is_left_out():
    group = harness.Group("g", "cpu", [], {"liar": lambda: torch.zeros(3), "broken": lambda: 1 / 0})

    def check(result):
        assert bool((result == 1).all()), "not one"

    case = harness.Case("op", "c", torch.float32, lambda: torch.ones(3), check)
    case.peers = [harness.Peer("liar", "liar", check=check), harness.Peer("broken", "broken")]
    group.cases.append(case)
    (row,) = harness.measure(group, harness.Settings(0.01, 1, 2))
    assert row["status"] == "timed"
    assert row["peers"]["liar"] == {"reason": "its result is not the definition's: not one"}
    assert "ZeroDivisionError" in row["peers"]["broken"]["reason"]


def test_rounds_are_interleaved():
    order = []
    calls = {name: lambda n=name: order.append(n) for name in "abc"}
    samples = harness.interleave(calls, "cpu", harness.Settings(0.0, 3, 3))
    assert order == list("abcbcacab")
    assert all(len(s.wall) == len(s.cpu) == 3 for s in samples.values())


def test_gpu_timer_lets_the_host_get_ahead(monkeypatch):
    """On a stand-in for a GPU: the device waits as long as the host took last time, before the first event."""
    done, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")
            self.at = now[0]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def call():
        done.append("call")
        now[0] += 0.004

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(round(cycles / 2e9, 6)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(4, dtype=dtype))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    samples = harness.interleave({"plan": call}, "cuda", harness.Settings(0.0, 2, 2))["plan"]
    assert done == [
        0.003,
        "event",
        "call",
        "event",
        "synchronize",
        0.006,
        "event",
        "call",
        "event",
        "synchronize",
    ]
    assert samples.wall == pytest.approx([4000.0, 4000.0]) and samples.host == pytest.approx([4000.0, 4000.0])
    assert harness._statistics(samples)["host_us"] == pytest.approx(4000.0) and not samples.cpu


def test_errors_lose_their_folders():
    assert harness.short("No such file: /some/where/lib.so\nmore") == "No such file: lib.so"
    assert bench_run.hide_paths(["--out=/a/b/c", "/a/b/d", "--x", "y"]) == ["--out=.../c", ".../d", "--x", "y"]


def shell(*arguments):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30)


def stages_of(*arguments) -> list[str]:
    done = shell("bash", "bench/gpu.sh", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("stage ")]


def test_gpu_script_dry_run():
    assert shell("bash", "-n", "bench/gpu.sh").returncode == 0
    assert shell("bash", "-n", "bench/build_fa3.sh").returncode == 0
    names = stages_of()
    # Correctness first, then the figures, then the rest; without a GPU, 9.0 is taken.
    assert names[:6] == ["environment", "build", "loads", "check_attention", "check_linear", "check_vq"]
    assert names[6:9] == ["check_attention_sm90", "check_linear_sm90", "check_vq_sm90"]
    assert names[9:11] == ["figures-sm90", "figures-sm80"]
    assert names.index("layer") < names.index("sanitizer_memcheck_sm90") < names.index("planner-hunyuan")
    assert names[-1] == "counters_sm80" and {"svg2-hunyuan", "overlap-sm90"} <= set(names)
    checkers = {
        f"sanitizer_{tool}_{k}" for tool in ("memcheck", "synccheck", "racecheck") for k in ("sm90", "sm80")
    }
    assert checkers <= set(names)
    assert "build" not in stages_of("--libraries", "elsewhere")
    assert stages_of("--wheels", "w", "--fa3", "f")[:2] == ["wheels", "fa3"]
    assert stages_of("--arch", "80-real")[3:] == [n for n in names[3:] if "sm90" not in n]
    assert shell("bash", "bench/gpu.sh", "--nonsense").returncode == 2


def test_gpu_script_in_parts():
    """A call can be split; together the parts are the whole, and every part sets up what it needs."""
    setup = stages_of()[:3]
    parts = ["check", "figures", "resources", "layer", "sanitizer", "timings", "counters"]
    found = [stages_of("--only", part) for part in parts]
    assert all(names[:3] == setup for names in found)
    assert [name for names in found for name in names[3:]] == stages_of()[3:]
    assert stages_of("--only", "layer,check")[3] == "check_attention"
    wrong = shell("bash", "bench/gpu.sh", "--only", "figures,colour")
    assert wrong.returncode == 2 and "colour" in wrong.stderr


def test_gpu_script_arguments_parse():
    """Every timing stage of the script is a command line that run.py takes."""
    done = shell("bash", "bench/gpu.sh", "--dry-run")
    lines = [
        line.split("bench/run.py ", 1)[1].split() for line in done.stdout.splitlines() if "bench/run.py" in line
    ]
    assert len(lines) >= 6
    for words in lines:
        args = bench_run.parse(words)
        family = importlib.import_module(f"bench_{args.family}")
        assert list(family.groups(args, "cuda")), words


def gpu_script(tmp_path, *arguments, **variables):
    """The script as it runs where tools and GPU are mocked by what stands in tmp_path/bin."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in ("nvidia-smi", "compute-sanitizer", "ncu", "cuobjdump", "python"):
        if not (folder / name).exists():
            (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}
    command = ["bash", "bench/gpu.sh", "--out", str(tmp_path / "out"), "--libraries", str(tmp_path)]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_gpu_script_reports_findings_and_skips(tmp_path):
    """A checker that finds something and a profiler that may not read are told apart from failures."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").write_text(
        '#!/bin/sh\ncase "$*" in *--help*) echo --kernel-name;; *racecheck*) echo "== RACECHECK SUMMARY: 3 hazards"; '
        'exit 9;; *) echo "$*"; echo "== ERROR SUMMARY: 0 errors";; esac\n'
    )
    (tmp_path / "bin" / "ncu").write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    done = gpu_script(tmp_path, "--only", "sanitizer,counters", "--arch", "90a-real")
    summary_of = done.stdout.split("== summary")[1]
    assert done.returncode == 1
    assert summary_of.count("findings: read sanitizer_racecheck_") == 2
    assert summary_of.count("skipped: the hardware counters may not be read here") == 2
    log = (tmp_path / "out" / "sanitizer_racecheck_sm90.log").read_text()
    assert "raw bulk copies" in log and "RACECHECK SUMMARY" in log
    log = (tmp_path / "out" / "sanitizer_memcheck_sm80.log").read_text()
    assert "attention kernel sm80" in log and "--kernel-name kns=_ZN4vdit" in log
    assert summary.sanitizer_lines(tmp_path / "out")[-1].endswith("SUMMARY: 0 errors")


def test_gpu_script_goes_on_after_a_failure(tmp_path):
    (tmp_path / "bin").mkdir()
    fails = '#!/bin/sh\ncase "$*" in *check_cuda*|*kernel_resources*) exit 5;; esac\n'
    (tmp_path / "bin" / "python").write_text(fails)
    done = gpu_script(tmp_path, "--only", "check,figures,resources", "--arch", "80-real")
    assert done.returncode == 1
    states = dict(
        line.split(maxsplit=3)[::3] for line in done.stdout.split("== summary")[1].splitlines()[1:] if line
    )
    assert states["check_attention"] == "failed (5)" == states["resources"] and states["figures-sm80"] == "ok"


def test_check_script_selects_cases():
    names = [f"case {i}" for i in range(40)]
    checks = types.SimpleNamespace(named_cases=lambda op, large, backend: [(name, None) for name in names])

    def chosen(select="", per_op=0):
        args = argparse.Namespace(select=select, per_op=per_op, large=False)
        return [name for name, _ in check_cuda.selected(checks, "an_op", args, None)]

    assert chosen() == names and chosen(select="^an_op case 3$") == ["case 3"]
    few = chosen(per_op=6)
    assert len(few) == 6 and few == chosen(per_op=6) and few == [name for name in names if name in few]
    assert chosen(per_op=99) == names


def test_a_worker_tells_of_failures():
    """Its exit code is what a checker that wraps it passes on."""
    command = [sys.executable, "bench/check_cuda.py", "--worker", "--backend", "cpu", "--family", "attention"]
    command += ["--op", "label_sort", "--select", "N=777 "]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    broken = "import sys; sys.argv[1:] = {!r}; sys.path.insert(0, 'bench'); import check_cuda, check_attention as c; "
    broken += "c.same = lambda *a: (_ for _ in ()).throw(AssertionError('no')); sys.exit(check_cuda.main())"
    done = subprocess.run(
        [sys.executable, "-c", broken.format(command[2:])], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 4, done.stderr


def test_check_script_goes_on_after_failures(tmp_path):
    """On the CPU backend, one small op; and a start that fails is reported, not swallowed."""
    out = tmp_path / "check_attention.json"
    command = [sys.executable, "bench/check_cuda.py", "--backend", "cpu", "--op", "stream", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["fault"] for r in json.loads(out.read_text())["results"]] == [""]
    out.write_text(
        json.dumps(
            {"results": [{"op": "a", "case": "c", "fault": "bad"}, {"op": "a", "case": "d", "fault": ""}]}
        )
    )
    assert summary.check_lines(tmp_path)[:2] == [
        "a                           1 passed    1 failed",
        "  FAIL a c: bad",
    ]
