"""The figures against targets, the structured inputs, the peers and the whole layers, at sizes of a CPU."""

from __future__ import annotations

import json
import sys
import types

import attention_peers
import bench_attention
import bench_hopper
import bench_layer
import figures
import harness
import one_call
import pytest
import run as bench_run
import summary
import synthetic
import torch

from vdit_ext import ops
from vdit_ext.sparse import TokenLayout

TINY = ["--device", "cpu", "--dtype", "float32", "--grid", "2,8,12", "--text", "6", "--heads", "2"]
TINY += ["--clusters", "4,7", "--seconds", "0.02", "--min-rounds", "2", "--max-rounds", "2"]
LAYOUT = TokenLayout((4, 12, 16), 10)


pytestmark = pytest.mark.usefixtures("quick")


def result_of(tmp_path, *words) -> tuple[int, dict, str]:
    code = bench_run.main([*words, *TINY, "--out", str(tmp_path), "--name", "x_gpu_figures"])
    text = (tmp_path / "x_gpu_figures.md").read_text()
    return code, json.loads((tmp_path / "x_gpu_figures.json").read_text()), text


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------


def attention_row(
    model="hunyuan", kind="b128", *, us=200.0, density=0.5, dim=128, peers=None, **figure
) -> dict:
    """A row as the harness makes it; peers: name to microseconds of dense attention."""
    dense = {"cuDNN x density": 300.0, "FA2 in torch x density": 500.0} if peers is None else peers
    sizes = {
        "figure": {"model": model, "kind": kind} | figure,
        "density": density,
        "head_dim": dim,
        "kernel": "sm90",
    }
    made = {name: {"us": t, "scale": density, "ratio": us / (density * t)} for name, t in dense.items()}
    return {
        "case": f"{model}_{kind}",
        "status": "timed",
        "us": us,
        "tflops": 500.0,
        "peers": made,
        "sizes": sizes,
    }


def test_ratio_is_a_speed_against_the_fastest_dense_peer_at_the_kept_density():
    (entry,) = figures.figures_of([attention_row(us=200.0, density=0.5)])
    assert entry["peer"] == "cuDNN" and entry["peer_us"] == 300.0
    assert entry["ratio"] == pytest.approx(0.5 * 300.0 / 200.0)
    assert (entry["must"], entry["aim"], entry["verdict"]) == (0.90, 0.97, "not met")


@pytest.mark.parametrize(
    ("model", "kind", "dim", "target"),
    [
        ("hunyuan", "dense", 128, (0.95, 1.0)),
        ("wan14b", "dense", 128, None),
        ("wan14b", "b128", 128, (0.90, 0.97)),
        ("wan14b", "variable", 128, (0.85, 0.92)),
        ("cogvideox", "variable", 64, (0.85, 0.92)),
        ("hunyuan", "b64", 128, (0.65, 0.80)),
        ("cogvideox", "b64", 64, (0.65, 0.80)),
        ("cogvideox", "b128", 64, (0.90, 1.1)),
        ("cogvideox", "dense", 64, (0.90, 1.1)),
    ],
)
def test_targets(model, kind, dim, target):
    assert figures.target_of(kind, dim, model) == target


@pytest.mark.parametrize(("us", "verdict"), [(152.0, "aim met"), (160.0, "met"), (170.0, "not met")])
def test_verdicts(us, verdict):
    rows = [attention_row(us=us, density=0.5, peers={"FA3 x density": 300.0})]
    assert figures.figures_of(rows)[0]["verdict"] == verdict


def test_sparse_peers_are_not_dense_ones():
    row = attention_row(peers={"FlashInfer with plan()": 1.0})
    assert figures.figures_of([row])[0]["verdict"] == "no dense peer ran"
    row = attention_row() | {"status": "check failed"}
    assert figures.figures_of([row])[0]["verdict"] == "check failed"


def test_overhead_is_plan_and_permutation_over_attention():
    rows = [attention_row(kind="variable", us=1000.0, method="svg2", part="attention")]
    for part, us in (("plan", 12.0), ("permute", 20.0)):
        rows.append(attention_row(kind="variable", us=us, method="svg2", part=part))
    rows.append(attention_row(kind="variable", us=1.0, method="draft", part="attention"))
    overhead = figures.figures_of(rows)[1]
    assert overhead["ratio"] == pytest.approx(0.032) and overhead["verdict"] == "met"
    assert (overhead["plan_us"], overhead["permute_us"], overhead["attention_us"]) == (12.0, 20.0, 1000.0)
    del rows[2]  # a method that permutes nothing
    assert figures.figures_of(rows)[1]["verdict"] == "aim met"
    rows[0] |= {"status": "check failed"}
    assert figures.figures_of(rows)[1]["verdict"] == "attention was not timed"


def test_figures_run(tmp_path, capsys):
    """Every kind and both methods at one model; densities are those of the lists, tables stand where they belong."""
    code, result, page = result_of(tmp_path, "hopper", "--shapes", "wan14b", "--no-flex")
    assert code == 0, page
    rows = {row["case"]: row for row in result["rows"] if row["op"] == "block_sparse_attention"}
    assert len(rows) == sum(len(d) for d in bench_hopper.KINDS.values()) + 2
    for row in rows.values():
        assert row["sizes"]["kernel"] == "cpu" and "SDPA x density" in row["peers"]
        pairs = row["sizes"]["density"] * 2 * 192 * 192
        assert row["flops"] == pytest.approx(4 * 128 * pairs) and row["exps"] == pytest.approx(pairs)
    assert rows["wan14b_dense_rho1"]["sizes"]["density"] == 1.0
    assert {row["op"] for row in result["rows"]} == {"block_sparse_attention", "plan", "permute"}
    assert [r["case"] for r in result["rows"] if r["op"] == "permute"] == ["wan14b_svg2"], (
        "a hoisted order moves nothing"
    )
    (table,) = result["tables"]
    assert [line[0] for line in table["cells"]][-4:] == [
        "wan14b_svg2", "wan14b_svg2 plan + permute", "wan14b_draft", "wan14b_draft plan + permute",
    ]  # fmt: skip
    assert "## Figures against targets" in page
    assert capsys.readouterr().out.rstrip().splitlines()[-1] == table["last"]
    assert summary.last_lines(tmp_path)[-1] == table["last"]
    assert not summary.timing_lines(tmp_path), "not twice"


def test_a_wrong_kernel_gets_no_figure(tmp_path, monkeypatch):
    right = ops.block_sparse_attention

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        out[..., 100, 3] += 0.5
        return out, lse

    monkeypatch.setattr(bench_hopper.ops, "block_sparse_attention", wrong)
    code, result, _ = result_of(
        tmp_path, "hopper", "--shapes", "hunyuan", "--no-flex", "--select", "b128_rho0.5|svg2"
    )
    assert code == 1
    assert [line[-1] for line in result["tables"][0]["cells"]] == [
        "check failed", "check failed", "attention was not timed",
    ]  # fmt: skip


def test_a_permutation_that_is_not_the_definitions_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_hopper.ops, "permute_rows", lambda x, index: x.clone())
    _, result, _ = result_of(tmp_path, "hopper", "--shapes", "wan14b", "--no-flex", "--select", "svg2")
    assert {r["op"]: r["status"] for r in result["rows"]}["permute"] == "check failed"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["vdit::sm90::OrderItems", "void kernel_entry<vdit::sm90::BlockSparseAttentionKernel<...>>(...)"],
            "sm90",
        ),
        (["void kernel_entry<vdit::BlockSparseAttentionKernel<cutlass::bfloat16_t, 128, 128>>(...)"], "sm80"),
        (["memcpy"], "sm90, not seen"),
    ],
)
def test_the_kernel_is_the_one_that_ran(names, expected, monkeypatch):
    class Seen:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            return [types.SimpleNamespace(key=name) for name in names]

    monkeypatch.setattr(torch.profiler, "profile", Seen)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("VDIT_ATTENTION_KERNEL", "sm90")
    assert bench_hopper.kernel_of(lambda: None, "cuda") == expected


def test_models_are_those_of_the_cases():
    assert set(bench_hopper.MODELS) == set(bench_hopper.cases.REAL)
    sizes = {name: (m.layout.num_tokens, m.heads, m.dim) for name, m in bench_hopper.MODELS.items()}
    assert sizes["hunyuan"] == (119_056, 24, 128) and sizes["cogvideox"] == (45_106, 48, 64)


def test_one_call_for_a_profiler(capsys, monkeypatch):
    small = bench_hopper.replace(bench_hopper.MODELS["hunyuan"], layout=LAYOUT, q_clusters=4, k_clusters=9)
    monkeypatch.setitem(bench_hopper.MODELS, "hunyuan", small)
    assert one_call.main(["--device", "cpu", "--kind", "variable", "--density", "0.3", "--heads", "1"]) == 0
    assert "finite True" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Structured inputs
# ---------------------------------------------------------------------------------------------------------


def test_uneven_clusters_cover_everything_with_uneven_sizes():
    offsets = synthetic.uneven_offsets(40, 20_000, 3, generator())
    sizes = offsets.diff(dim=-1)
    assert offsets.shape == (1, 3, 41) and offsets.dtype == torch.int32
    assert (
        bool((offsets[..., 0] == 0).all())
        and bool((offsets[..., -1] == 20_000).all())
        and int(sizes.min()) >= 0
    )
    assert sizes.max() > 2 * sizes.float().mean() > 4 * sizes.min()


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5])
def test_uneven_lists_keep_the_density_asked_for(density):
    q_offsets, kv_offsets = (synthetic.uneven_offsets(n, 30_000, 4, generator(n)) for n in (50, 200))
    counts, lists = synthetic.uneven_lists(q_offsets, kv_offsets, density, generator())
    q = torch.empty(1, 4, 30_000, 0)
    kwargs = {"q_offsets": q_offsets, "kv_offsets": kv_offsets}
    kept = bench_attention.kept_pairs(counts, lists, kwargs, q, q) / (4 * 30_000**2)
    assert kept == pytest.approx(density, rel=0.1)
    assert counts.max() > 2 * counts.min() > 0


def test_uniform_lists():
    counts, lists = synthetic.uniform_lists(5, 20, 3, 0.25, generator())
    assert lists.shape == (1, 3, 5, 5) and bool((counts == 5).all())
    assert bool((lists.diff(dim=-1) > 0).all()), "ascending and unique"
    counts, lists = synthetic.uniform_lists(5, 20, 3, 1.0, generator())
    assert lists.shape == (1, 1, 5, 20) and bool((lists == torch.arange(20)).all())


def test_video_inputs_make_selection_by_clusters_keep_a_part():
    """Real attention mass: SVG2 keeps some of the pairs, and fewer where the gain is higher."""
    layout = TokenLayout((8, 24, 32), 16)
    q, k, v = synthetic.video_qkv(layout, 3, 64, torch.float32, "cpu")
    assert q.shape == (1, 3, layout.num_tokens, 64) and q.transpose(1, 2).is_contiguous()
    method, state = bench_hopper.make_method("svg2", 40, 100, 0.75)
    density = method.plan(q, k, layout, state).density(layout.num_tokens, layout.num_tokens)[0]
    assert float(density.min()) > 0.1 and float(density.max()) < 0.8
    assert float(density[0]) > float(density[-1])


# ---------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------


def peer_inputs(block: int | None):
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    if block is None:
        offsets = torch.tensor([[[0, 90, 300]]], dtype=torch.int32)
        counts, lists = (
            torch.ones(1, 2, 2, dtype=torch.int32),
            torch.tensor([[[[1], [0]]] * 2], dtype=torch.int32),
        )
        return q, k, v, counts, lists, {"q_offsets": offsets, "kv_offsets": offsets, "scale": None}
    num = -(-300 // block)
    counts, lists = synthetic.uniform_lists(num, num, 2, 0.5, generator())
    return q, k, v, counts, lists, {"q_block_size": block, "kv_block_size": block, "scale": None}


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [
        ("FlexAttention", None, "uniform blocks only"),
        ("FlashInfer with plan()", None, "flashinfer-python is not installed"),
        ("FlashInfer without plan()", 128, "flashinfer-python is not installed"),
        ("FlashInfer sm90 64x64 without plan()", 64, "flashinfer-python is not installed"),
        ("FlashInfer sm90 64x64 without plan()", 128, "blocks of 64 only"),
        ("block_sparse_attn", 128, "block-sparse-attn is not installed"),
        ("block_sparse_attn", 64, "blocks of 128 only"),
        ("SVG2 Triton", None, "Sparse-VideoGen (svg) is not installed"),
        ("FA4 blocks", 128, "flash-attn-4 is not installed"),
    ],
)
def test_a_missing_peer_says_why(name, block, reason, monkeypatch):
    for module in ("flashinfer", "block_sparse_attn", "svg", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.sparse", None)
    attention_peers._flash.cache_clear()
    monkeypatch.setattr(attention_peers.importlib, "import_module", missing)
    with pytest.raises(attention_peers.NotHere, match=reason.replace("(", r"\(").replace(")", r"\)")):
        attention_peers.sparse("cuda")[name](*peer_inputs(block))


def missing(module):
    raise ModuleNotFoundError(f"No module named {module!r}", name=module.split(".")[0])


def test_a_missing_dense_peer_says_why(monkeypatch):
    attention_peers._flash.cache_clear()
    monkeypatch.setattr(attention_peers.importlib, "import_module", missing)
    calls = attention_peers.dense(*peer_inputs(128)[:3], "cuda")
    assert {"cuDNN x density", "FA2 in torch x density", "FA3 x density", "FA4 x density"} <= set(calls)
    group = harness.Group("g", "cpu", [], calls)
    reason = harness._try_peer(harness.Peer("FA3", "FA3 x density"), group)
    assert reason == "flash-attn-3 (hopper/ of flash-attention) is not installed"


def test_peers_get_what_they_document(monkeypatch):
    """Stand-ins that compute from the arguments as the libraries define them give our result."""
    q, k, v, counts, lists, kwargs = peer_inputs(None)
    expected = ops.block_sparse_attention(q, k, v, counts, lists, **kwargs)[0]

    def by_mask(q, k, v, mask, q_sizes, kv_sizes):  # [h, s, d], [h, nq, nkv], [h, nq], [h, nkv]
        outs = []
        for h in range(q.shape[0]):
            rows = mask[h].repeat_interleave(q_sizes[h], 0).repeat_interleave(kv_sizes[h], 1)
            outs.append(torch.nn.functional.scaled_dot_product_attention(q[h], k[h], v[h], attn_mask=rows))
        return torch.stack(outs)

    class Wrapper:
        def __init__(self, workspace, backend):
            assert workspace.dtype == torch.uint8 and backend == "auto"

        def plan(
            self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, **more
        ):
            assert block_row_sz.dtype == block_col_sz.dtype == torch.int32 and more["q_data_type"] == q.dtype
            assert (num_qo_heads, num_kv_heads, head_dim) == (2, 2, 64)
            self.blocks = block_mask_map, block_row_sz, block_col_sz

        def run(self, q, k, v):
            return by_mask(q, k, v, *self.blocks)

    def svg(q, k, v, dynamic_map, qc_size, kc_size):
        return by_mask(q[0], k[0], v[0], dynamic_map[0], qc_size[0], kc_size[0])[None]

    monkeypatch.setattr(
        attention_peers, "needed", lambda module, name, package: {"svg.kmeans_utils": svg}.get(module, Wrapper)
    )
    for make in (attention_peers.flashinfer, attention_peers.flashinfer_run, attention_peers.svg_triton):
        torch.testing.assert_close(make(q, k, v, counts, lists, kwargs)(), expected)


def test_a_peer_of_whole_blocks_is_compared_by_its_share(monkeypatch):
    q, k, v, counts, lists, kwargs = peer_inputs(64)
    seen = {}

    class Wrapper:
        def __init__(self, workspace, backend):
            assert backend == "vsa_sm90_blk64"

        def plan(self, indptr, indices, rows, columns, r, c, *sizes, block_mask, **more):
            seen.update(rows=rows, columns=columns, mask=block_mask)

        def run(self, q, k, v):
            assert q.shape == (256, 2, 64)
            return q

    monkeypatch.setattr(attention_peers, "needed", lambda *names: Wrapper)
    call, share = attention_peers.flashinfer_sm90(q, k, v, counts, lists, kwargs)
    assert call().shape == (1, 2, 256, 64)
    assert (seen["rows"], seen["columns"]) == (256, 256) and seen["mask"].shape == (2, 4, 4)
    ours = bench_attention.kept_pairs(counts, lists, kwargs, q, k)
    assert share == pytest.approx(int(seen["mask"].sum()) * 64 * 64 / ours) and share < 1


# ---------------------------------------------------------------------------------------------------------
# Whole layers
# ---------------------------------------------------------------------------------------------------------


def test_layers_run(tmp_path, monkeypatch):
    """Wan dense and accelerated with both methods, one layer without a processor dense alone."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(bench_layer.TRANSFORMERS, "cogvideox", "NoSuchTransformer")
    code, result, page = result_of(tmp_path, "layer", "--shape", "wan14b,cogvideox")
    assert code == 0, page
    parts = [(row["sizes"]["method"], row["op"]) for row in result["rows"]]
    assert parts == [
        ("svg2", "layer"), ("svg2", "attention"), ("svg2", "plan"), ("svg2", "permute"),
        ("draft", "layer"), ("draft", "attention"), ("draft", "plan"),
        ("dense", "dense layer"), ("dense", "dense attention"),
    ]  # fmt: skip
    (table,) = result["tables"]
    assert [line[1] for line in table["cells"]] == [
        "dense, SDPA",
        "svg2",
        "dense, SDPA",
        "draft",
        "dense, SDPA",
    ]
    for line in table["cells"]:
        numbers = [float(cell) for cell in line[4:9] if cell != "-"]
        assert numbers[0] == pytest.approx(sum(numbers[1:]), abs=0.01), "the parts add up to the layer"
    assert table["last"] == "cogvideox: dense only, vdit_ext has no processor for NoSuchTransformer"
    assert 0 < result["rows"][0]["sizes"]["density"] < 1


@pytest.mark.parametrize("shape", ["hunyuan", "hunyuan_single"])
def test_blocks_of_hunyuan_run_dense(shape, monkeypatch):
    pytest.importorskip("diffusers")
    model = bench_hopper.replace(bench_hopper.MODELS["hunyuan"], layout=TokenLayout((2, 4, 6), 5), heads=1)
    layer = bench_layer.SHAPES[shape][0](model, torch.float32, "cpu")
    with torch.no_grad():
        out = layer.run(layer.upstream)
    assert out.shape == (1, 48, 128) and bool(out.isfinite().all())


def test_a_layer_whose_attention_is_wrong_is_not_timed(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    right = ops.block_sparse_attention
    monkeypatch.setattr(ops, "block_sparse_attention", lambda *a, **k: tuple(t * 1.05 for t in right(*a, **k)))
    code, result, _ = result_of(tmp_path, "layer", "--shape", "wan14b", "--methods", "draft")
    states = {row["op"]: row for row in result["rows"]}
    assert code == 1 and states["layer"]["status"] == "check failed"
    assert (
        "with everything kept" in states["layer"]["check"] and states["attention"]["status"] == "check failed"
    )
