"""Planning never waits for the device, so that plan and attention fit into one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cases.plans import WouldWait, meta_qkv, warm_plan, watched
from cases.sparse import tensors

import vdit_ext
from vdit_ext.sparse import SVG2, DraftAttention, TokenLayout
from vdit_ext.sparse.shapes import SHAPES
from vdit_ext.sparse.tiles import tile_order

METHODS = {
    "svg2": SVG2(num_q_clusters=20, num_k_clusters=50, iter_init=3, iter_step=2),
    "draft": DraftAttention(tile=(4, 4)),
    "draft_ragged": DraftAttention(tile=(5, 7), score="logit", budget="all_heads", first_frame_sink=True),
    "draft_code": DraftAttention(tile=(5, 7), parity="code", same_frame=True),
}
GRID = (4, 12, 20)
LAYOUTS = {
    "video": TokenLayout(GRID),
    "text": TokenLayout(GRID, 20),
    "padded_text": TokenLayout(GRID, 20, 7),
    "text_first": TokenLayout(GRID, 20, 7, text_first=True),
}


# --- Without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_warm_plan_and_its_attention_read_nothing_back(method, layout):
    layout = LAYOUTS[layout]
    with watched() as seen:
        q, k, v = meta_qkv(3, layout.num_tokens, 64, batch=2)
        plan = warm_plan(METHODS[method], q, k, layout)
        out, lse = plan.attend(q, k, v)
        assert plan.density(layout.num_tokens, layout.num_tokens).is_meta
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert "vdit::block_sparse_attention" in [call.name for call in seen.calls]


def test_a_warm_svg2_plan_runs_these_ops():
    """Two Lloyd iterations of three ops for queries and keys each, and no elementwise work within them."""
    with watched() as seen:
        q, k, _ = meta_qkv(3, 960, 64)
        warm_plan(METHODS["svg2"], q, k, LAYOUTS["video"])
    names = [call.name.removeprefix("vdit::").removeprefix("aten::") for call in seen.calls]
    iteration = ["kmeans_assign", "label_sort", "segment_mean"]
    cluster = ["nan_to_num", *iteration * 2, "copy_"]
    assert names[: 2 * len(cluster)] == cluster * 2
    assert names[2 * len(cluster) :] == ["sub", "_to_copy", "_to_copy", "bmm", "mul", "topp_blocks"]


@pytest.mark.parametrize("model", ["hunyuan-t2v-720p", "wan2.1-14b-t2v-720p"])
def test_plans_of_the_published_shapes(model):
    shape = SHAPES[model]
    for method in (
        SVG2.preset(model, "repo"),
        DraftAttention.preset(model),
        DraftAttention.preset(model, "repo"),
    ):
        with watched():
            q, k, v = meta_qkv(shape.heads, shape.layout.num_tokens, shape.head_dim)
            assert warm_plan(method, q, k, shape.layout).attend(q, k, v)[0].shape == q.shape


SEEN = "cannot be called on meta|register_meta function for torch.nonzero|Cannot copy out of meta|from the host"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.arange(5).to(x.device),
        lambda x: x + torch.tensor([1.0] * 5, device=x.device),
        lambda x: x.copy_(torch.ones(5)),
        lambda x: torch.ones(5).copy_(x),
    ],
)
def test_what_would_wait_is_seen(wait):
    with watched(), pytest.raises((RuntimeError, WouldWait), match=SEEN):
        wait(torch.empty(5, device="meta"))


@pytest.mark.parametrize("modes", [(False, False), (True, False), (False, True)])
def test_centroids_stay_in_one_place(modes):
    """A captured graph reads and writes them there; the caller's autograd mode may change between steps."""
    method, layout = METHODS["svg2"], LAYOUTS["video"]
    state, twin, places = method.new_state(0, 1), method.new_state(0, 1), []
    for step, mode in enumerate((modes[0], *modes)):
        q, k, _ = tensors(1, 2, layout.num_tokens, 16, seed=step)
        with torch.inference_mode(mode):
            method.plan(q, k, layout, state)
        with torch.no_grad():
            method.plan(q, k, layout, twin)
        places.append({slot: t.data_ptr() for slot, t in state.centroids.items()})
        for slot, centroids in state.centroids.items():
            assert torch.equal(centroids, twin.centroids[slot]) and not centroids.is_inference()
    assert places[0] == places[1] == places[2]


# --- With one ------------------------------------------------------------------------------------------------


def capture(run) -> torch.cuda.CUDAGraph:
    """A graph of run(), called before as torch asks: on a side stream, until nothing new is set up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_replays_on_other_inputs(method, layout):
    """Plan, permutation and attention as one graph: step for step the bits of eager code, centroids included."""
    if not torch.cuda.is_available():
        pytest.skip("cuda: no GPU on this machine")
    if vdit_ext.ops.LIBRARIES["cuda"] != "loaded":
        pytest.skip(f"cuda: {vdit_ext.ops.LIBRARIES['cuda']}")
    method, layout = METHODS[method], LAYOUTS[layout]

    def inputs(seed):
        return tensors(2, 3, layout.num_tokens, 64, seed=seed, dtype=torch.bfloat16)

    # One state for the graph and one for eager code. Both begin with the same cold step.
    fixed = [t.cuda() for t in inputs(0)]
    state, twin = method.new_state(0, 1), method.new_state(0, 1)
    for each in (state, twin):
        method.plan(*fixed[:2], layout, each)
    start = {slot: t.clone() for slot, t in getattr(state, "centroids", {}).items()}
    results = []

    def step():
        results[:] = method.plan(*fixed[:2], layout, state).attend(*fixed)

    graph = capture(step)
    for slot, centroids in start.items():
        state.centroids[slot].copy_(centroids)
    for seed in range(1, 5):
        fresh = [t.cuda() for t in inputs(seed)]
        for place, t in zip(fixed, fresh, strict=True):
            place.copy_(t)
        graph.replay()
        expected = method.plan(*fresh[:2], layout, twin).attend(*fresh)
        for got, want, what in zip(results, expected, ("out", "lse"), strict=True):
            assert torch.equal(got, want), f"{what} of replay {seed}"
        for slot in start:
            assert torch.equal(state.centroids[slot], twin.centroids[slot]), f"centroids of replay {seed}"
            assert not torch.equal(state.centroids[slot], start[slot]), "the centroids move"


def test_tables_made_while_a_graph_is_captured_are_not_shared():
    """They hold nothing until the first replay."""
    if not torch.cuda.is_available():
        pytest.skip("cuda: no GPU on this machine")
    layout = TokenLayout((2, 6, 10))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tile_order(layout, (4, 4), torch.device("cuda"))
    expected = tile_order(layout, (4, 4), torch.device("cpu"))
    assert torch.equal(tile_order(layout, (4, 4), torch.device("cuda")).cpu(), expected)
