"""Sparse VideoGen2: cluster queries and keys by content and keep the cluster pairs that carry the mass.

Source: "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware Permutation",
arXiv 2505.18875 v3. Section numbers are those of its specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from .gate import count_dense_layers, is_dense_step, require_choice, require_number, require_whole
from .kmeans import INITS
from .plan import BlockPlan, StepInfo, TokenLayout, add_text_blocks, add_text_index, add_text_offsets
from .scores import block_logits
from .shapes import SHAPES, preset_settings
from .state import ClusterState, note_density, refine_clusters


@dataclass(frozen=True)
class SVG2:
    """Settings of Sparse VideoGen2; a :class:`~vdit_ext.sparse.plan.SparseMethod`.

    Attributes:
        top_p: attention mass to exceed in each query cluster's row, 0 to 1; 1 keeps everything.
        min_kc_ratio: share of the key clusters that every row keeps at least, 0 to 1 (0.10 in all scripts).
        num_q_clusters, num_k_clusters: clusters of each head, at least 1. A sequence with fewer video tokens
            than that gets one cluster a token.
        iter_init, iter_step: Lloyd iterations of a layer's first call and of the later ones, which start from
            the cached centroids; at least 1.
        iter_sample: all iterations of a call but its last see every ``iter_sample``-th token only; 1, as
            published, shows them all. A number that does not divide the grid's width is meant: 3 makes two
            iterations cost what 1.33 do.
        dense_step_fraction: the first ``floor(fraction * steps)`` steps run dense.
        dense_layer_fraction: the first ``floor(fraction * layers)`` layers run dense;
        dense_layer_rounding: "ceil" rounds that up instead, so that a small model gets a dense layer.
        zero_step_kmeans_init: cluster in dense steps too, so that the centroids are settled when sparsity
            starts (section 4.2).
        init: "random" rows with replacement, as the code does, or "kmeans++".
        cfg_cache: "shared" centroids for both guidance branches, as the authors intend, or "per_branch".
        tolerance: stop Lloyd early when no centroid moved farther, at least 0; reads back from the device.
            None: never.
        seed: of the initial rows, 0 or more.
        flow_shift: shift of the scheduler, at least 0, used only where the number of steps is unknown: it then
            tells by the timestep which steps are dense. None: :meth:`is_dense` raises there.

    The centroid cache starts anew on :meth:`reset`, and by itself when q's or k's shape, dtype or device
    changes. :meth:`begin_step` resets when a new video begins.

    Raises:
        ValueError: one sentence, when a setting is out of range or of the wrong type.
    """

    name: ClassVar[str] = "svg2"

    top_p: float = 0.9
    min_kc_ratio: float = 0.10
    num_q_clusters: int = 100
    num_k_clusters: int = 500
    iter_init: int = 50
    iter_step: int = 2
    iter_sample: int = 1
    dense_step_fraction: float = 0.3
    dense_layer_fraction: float = 0.0
    dense_layer_rounding: str = "floor"
    zero_step_kmeans_init: bool = False
    init: str = "random"
    cfg_cache: str = "shared"
    tolerance: float | None = None
    seed: int = 0
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        for field in ("top_p", "min_kc_ratio", "dense_step_fraction", "dense_layer_fraction"):
            require_number("SVG2", field, getattr(self, field), 0, 1)
        for field in ("num_q_clusters", "num_k_clusters", "iter_init", "iter_step", "iter_sample"):
            require_whole("SVG2", field, getattr(self, field), 1)
        require_whole("SVG2", "seed", self.seed, 0)
        if self.tolerance is not None and self.iter_sample > 1:
            raise ValueError(
                f"SVG2: tolerance must be None with iter_sample {self.iter_sample}, got {self.tolerance}; "
                "leave one of the two out"
            )
        for field in ("tolerance", "flow_shift"):
            if getattr(self, field) is not None:
                require_number("SVG2", field, getattr(self, field), 0)
        require_choice("SVG2", "dense_layer_rounding", self.dense_layer_rounding, ("floor", "ceil"))
        require_choice("SVG2", "init", self.init, INITS)
        require_choice("SVG2", "cfg_cache", self.cfg_cache, ("shared", "per_branch"))

    @classmethod
    def preset(cls, model: str, kind: str = "paper") -> SVG2:
        """Published settings.

        Args:
            model: a key of :data:`PRESETS`.
            kind: "paper" for the tables' settings (100 and 500 clusters, first 30 % of the steps dense) or
                "repo" for those of the shipped scripts. There is no script for wan2.1-1.3b; its "repo" preset
                takes over Wan's fractions, which round to no dense layer.

        Raises:
            ValueError: one sentence that lists the names there are.
        """
        return cls(**preset_settings("SVG2", PRESETS, model, kind))

    @property
    def observes_dense_steps(self) -> bool:
        """Whether :meth:`observe` wants to be called in dense steps."""
        return self.zero_step_kmeans_init

    def is_dense(self, info: StepInfo, layer: int) -> bool:
        """Whether this layer runs dense attention at this step (section 4.1). Host-side.

        Raises:
            ValueError: one sentence, when a share of the steps is dense and neither their number nor
                ``flow_shift`` is known.
        """
        dense_layers = count_dense_layers(self.dense_layer_fraction, info.num_layers, self.dense_layer_rounding)
        if layer < dense_layers:
            return True
        return is_dense_step(info, self.dense_step_fraction, self.flow_shift, self.name)

    def new_state(self, layer: int, num_layers: int) -> ClusterState:
        """Fresh state for one attention layer: empty centroid caches and a density log."""
        return ClusterState(
            layer,
            num_layers,
            iter_init=self.iter_init,
            iter_step=self.iter_step,
            init=self.init,
            tolerance=self.tolerance,
            seed=int(self.seed),
            sample=self.iter_sample,
            per_branch=self.cfg_cache == "per_branch",
        )

    def begin_step(self, info: StepInfo, layout: TokenLayout, state: ClusterState) -> None:
        """Choose the guidance branch's cache, and reset when a new video has begun. Host-side."""
        if state.begins_video(info, layout):
            self.reset(state)
        state.branch = info.branch

    def reset(self, state: ClusterState) -> None:
        """Forget centroids and densities."""
        state.reset()

    def token_order(self, layout: TokenLayout) -> None:
        """None: the permutation depends on layer and head."""
        return None

    def observe(self, q: Tensor, k: Tensor, layout: TokenLayout, state: ClusterState) -> None:
        """Warm the centroid cache in a dense step; q and k as in :meth:`plan`."""
        layout.check(q, k, "SVG2")
        self._cluster(q, k, layout, state)

    def plan(self, q: Tensor, k: Tensor, layout: TokenLayout, state: ClusterState) -> BlockPlan:
        """Cluster, select and lay out one attention call (sections 4.2 to 4.5).

        Args:
            q, k: ``[B, H, S, D]`` fp32, fp16 or bf16 after norm and RoPE, any strides with a contiguous last
                dimension.
            layout: grid and text; text makes a prompt and, where it may hold padding, a pad block.
            state: from :meth:`new_state`.

        Returns:
            A plan with variable blocks, one a cluster, and a permutation for each head. Empty clusters are
            blocks of size 0. A row with NaN or Inf is in some cluster, which then keeps the centroid it had.

        Raises:
            ValueError: one sentence, when q, k and the layout do not fit.
        """
        layout.check(q, k, "SVG2")
        (q_centroids, q_order, q_offsets), (k_centroids, k_order, k_offsets) = self._cluster(
            q, k, layout, state
        )
        counts, lists = self.select(q_centroids, k_centroids, k_offsets.diff(dim=-1))
        counts, lists = add_text_blocks(counts, lists, k_centroids.shape[2], layout)
        plan = BlockPlan(
            counts,
            lists,
            q_offsets=add_text_offsets(q_offsets, layout),
            kv_offsets=add_text_offsets(k_offsets, layout),
            q_index=add_text_index(q_order, layout),
            kv_index=add_text_index(k_order, layout),
        )
        note_density(plan, layout, state)
        return plan

    def select(self, q_centroids: Tensor, k_centroids: Tensor, k_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Key clusters of each query cluster (section 4.3), computed in fp32.

        Args:
            q_centroids: ``[B, H, Cq, D]``; k_centroids: ``[B, H, Ck, D]``.
            k_sizes: int32 ``[B|1, H|1, Ck]``, tokens of each key cluster.

        Returns:
            ``kv_num_blocks`` int32 ``[B, H, Cq]`` and ``kv_indices`` int32 ``[B, H, Cq, Ck]``.
        """
        min_blocks = max(1, int(self.min_kc_ratio * k_centroids.shape[2] + 1e-9))
        scores = block_logits(q_centroids, k_centroids)
        return ops.topp_blocks(scores, self.top_p, weights=k_sizes, min_blocks=min_blocks)

    def _cluster(self, q: Tensor, k: Tensor, layout: TokenLayout, state: ClusterState):
        num_q = min(self.num_q_clusters, layout.num_video)
        num_k = min(self.num_k_clusters, layout.num_video)
        return (
            refine_clusters(layout.video(q), state.handle, num_q, "q"),
            refine_clusters(layout.video(k), state.handle, num_k, "k"),
        )


def _presets() -> dict[str, dict[str, dict]]:
    # Section 4.6: clusters, dense steps, dense layers and observation of the shipped scripts.
    repo = {
        "hunyuan-t2v-720p": (400, 1000, 0.10, 0.03, True),
        "hunyuan-480p": (200, 1000, 0.04, 0.0, True),
        "wan2.1-14b-t2v-720p": (300, 1000, 0.20, 0.03, False),
        "wan-14b-i2v-720p": (300, 1000, 0.35, 0.03, False),
        "wan-i2v-480p": (200, 1000, 0.20, 0.03, True),
        "wan2.1-1.3b": (200, 1000, 0.20, 0.03, False),
        "cosmos1-14b": (400, 1000, 0.30, 0.03, False),
    }
    presets = {}
    for model, (num_q, num_k, steps, layers, observe) in repo.items():
        shift = SHAPES[model].flow_shift
        presets[model] = {
            "paper": dict(flow_shift=shift),
            "repo": dict(
                num_q_clusters=num_q,
                num_k_clusters=num_k,
                dense_step_fraction=steps,
                dense_layer_fraction=layers,
                zero_step_kmeans_init=observe,
                flow_shift=shift,
            ),
        }
    # Section 8: the small model loses quality easily and gets a dense layer.
    presets["wan2.1-1.3b"]["paper"] |= dict(dense_layer_fraction=0.03, dense_layer_rounding="ceil")
    # NOTE: PSNR of the toy clip against dense, mean of two prompts, at the density of the sparse steps: with
    # 128 and 256 clusters, p = 0.6, 30.6 dB at 0.34 (this one); without a dense layer, p = 0.65, 30.4 at 0.25,
    # but one clip at 26.8; with 64 and 128 clusters, p = 0.5, 25.8 at 0.31.
    presets["toy"] = {
        "paper": dict(
            top_p=0.6,
            num_q_clusters=128,
            num_k_clusters=256,
            iter_init=10,
            dense_layer_fraction=0.1,
            dense_layer_rounding="ceil",
            flow_shift=SHAPES["toy"].flow_shift,
        )
    }
    return presets


PRESETS = _presets()
