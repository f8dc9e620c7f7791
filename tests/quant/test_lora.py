"""LoRA beside quantized linears: through peft, before and after, and by the package's own adapters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")

from cases import quantized as make
from cases.transformers import CASES

from vdit_ext.integrations import accelerate
from vdit_ext.quant import QuantLinear, apply
from vdit_ext.quant.lora import add_lora, read_lora

WAN = next(case for case in CASES if case.name == "WanTransformer3DModel")
TARGETS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def run(model: nn.Module, **changes) -> torch.Tensor:
    return model(**(WAN.arguments() | changes), return_dict=False)[0]


def snr(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))


def state(model: nn.Module, rank: int = 3, seed: int = 0, alpha: float | None = None, prefix="transformer."):
    """A LoRA in diffusers' names that changes the output clearly."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for block in range(2):
        for target in TARGETS:
            name = f"blocks.{block}.{target}"
            linear = model.get_submodule(name)
            a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            b = torch.randn(linear.out_features, rank, generator=generator) / 2
            found[f"{prefix}{name}.lora_A.weight"], found[f"{prefix}{name}.lora_B.weight"] = a, b
            if alpha is not None:
                found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def with_lora(lora, scale: float = 1.0) -> nn.Module:
    """The full-precision model with the LoRA added to its weights."""
    model = WAN.build()
    for name, one in read_lora(lora).items():
        model.get_submodule(name).weight.data += scale * one.scale * one.b @ one.a
    return model


# -- own adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_the_low_rank_product_exactly(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    layer = QuantLinear(make.layer_of(model[0]))
    quantized = nn.Sequential(layer)
    a, b, x = torch.randn(4, 32), torch.randn(24, 4), torch.randn(2, 5, 32, dtype=dtype)
    adapter = add_lora(
        quantized, {"0.lora_A.weight": a, "0.lora_B.weight": b, "0.alpha": torch.tensor(8.0)}, scale=0.5
    )
    want = layer.forward(x) + (0.5 * 8.0 / 4) * F.linear(F.linear(x, a.to(dtype)), b.to(dtype))
    assert torch.equal(quantized(x), want) and adapter.layers == ["0"]
    adapter.scale = 0
    assert torch.equal(quantized(x), layer.forward(x))
    adapter.scale = 2
    assert torch.equal(quantized(x), layer.forward(x) + 4.0 * F.linear(F.linear(x, a.to(dtype)), b.to(dtype)))
    adapter.remove()
    assert torch.equal(quantized(x), layer.forward(x)) and not layer._forward_hooks


@pytest.mark.parametrize("kind", ["int8", "planes"])
def test_a_quantized_model_with_lora_is_near_the_full_one(kind):
    model = WAN.build()
    lora = state(model)
    want, plain = run(with_lora(lora)), run(model)
    with apply(model, make.quantized(model, kind)):
        bare = run(model)
        adapter = add_lora(model, lora)
        # Hardly more error than quantization makes without it: activations are another's.
        assert snr(run(model), want) > snr(bare, plain) - 6 > 25
        assert snr(bare, want) < 10  # the adapter matters
        adapter.remove()
        assert torch.equal(run(model), bare)


def test_several_adapters_add_up_and_come_off_in_any_order():
    model = WAN.build()
    with apply(model, make.quantized(model)):
        bare = run(model)
        first = add_lora(model, state(model, seed=0), name="first")
        alone = run(model)
        second = add_lora(model, state(model, seed=1), scale=0.7, name="second")
        both = run(model)
        first.remove()
        assert not torch.equal(both, alone) and not torch.equal(run(model), both)
        second.scale = 0.0
        assert torch.equal(run(model), bare)
        second.remove()


def test_blocks_with_adapters_run_unfused_and_equal():
    model = WAN.build()
    with accelerate(model, quant=make.quantized(model)) as handle:
        adapter = add_lora(model, state(model))
        got = run(model)
        assert not any("fused block" in row["reason"] for row in handle.explain().linears)
        adapter.remove()
        assert any("fused block" in row["reason"] for row in handle.explain().linears)
    with apply(model, make.quantized(model)):
        add_lora(model, state(model))
        assert torch.equal(got, run(model))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update({"blocks.0.attn1.to_q.weight": torch.ones(2)}), "keys must end in lora_A.weight"),
        (
            lambda s: s.pop("transformer.blocks.0.attn1.to_q.lora_B.weight"),
            "blocks.0.attn1.to_q must have .*lora_B",
        ),
        (
            lambda s: s.update({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}),
            "x must be",
        ),
        (
            lambda s: s.update({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(3, 25)}),
            "takes 24 and gives 24 channels, the LoRA is for 25 and 24",
        ),
        (
            lambda s: s.update({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(5, 24)}),
            r"lora_A \[r, in\] and lora_B \[out, r\] are expected, got \[5, 24\] and \[24, 3\]",
        ),
        (lambda s: s.clear(), "a state dict with LoRA factors is expected, got an empty one"),
    ],
)
def test_loras_that_do_not_fit_change_nothing(change, expected):
    model = WAN.build()
    lora = state(model)
    change(lora)
    with apply(model, make.quantized(model)):
        before = run(model)
        with pytest.raises(ValueError, match=expected):
            add_lora(model, lora)
        assert torch.equal(run(model), before)
        with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
            add_lora(model, state(model), scale=float("nan"))


def test_other_names_of_the_factors():
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")):
        (name, one), *rest = read_lora(
            {f"diffusion_model.x.{down}.weight": a, f"diffusion_model.x.{up}.weight": b}
        ).items()
        assert name == "x" and not rest and one.scale == 1 and one.a is a and one.b is b


# -- peft --------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("order", ["lora first", "quantized first"])
def test_peft_adapters_before_and_after_quantization(order):
    model = WAN.build()
    lora = state(model, alpha=6.0)
    want = run(with_lora(lora))
    alphas = {key: float(lora.pop(key)) for key in list(lora) if key.endswith(".alpha")}
    quantized = make.quantized(model)
    original = model.blocks[0].attn1.to_q

    def load():
        model.load_lora_adapter(dict(lora), network_alphas=alphas, adapter_name="one")

    if order == "lora first":
        load()
        handle = accelerate(model, quant=quantized)
    else:
        handle = accelerate(model, quant=quantized)
        load()
    wrapper = model.blocks[0].attn1.to_q
    assert type(wrapper).__module__.startswith("peft") and isinstance(wrapper.base_layer, QuantLinear)
    got = run(model)
    assert snr(got, want) > 25
    # The same as the package's own adapter, but for the order of sums.
    reference = WAN.build()
    with apply(reference, quantized):
        add_lora(reference, state(reference, alpha=6.0))
        torch.testing.assert_close(got, run(reference), rtol=1e-4, atol=1e-4)
    model.set_adapters(["one"], [0.0])
    assert snr(run(model), run(WAN.build())) > 25
    model.set_adapters(["one"], [1.0])
    torch.testing.assert_close(run(model), got)
    handle.undo()  # the adapter stays, on the original weights
    assert model.blocks[0].attn1.to_q is wrapper and wrapper.base_layer is original
    torch.testing.assert_close(run(model), want, rtol=1e-4, atol=1e-4)


def test_peft_adapters_taken_off_leave_what_is_restored():
    model = WAN.build()
    original, want = model.blocks[0].attn1.to_q, run(model)
    model.load_lora_adapter(state(model), adapter_name="one")
    handle = accelerate(model, quant=make.quantized(model))
    model.unload_lora()
    assert isinstance(model.blocks[0].attn1.to_q, QuantLinear)
    handle.undo()
    assert model.blocks[0].attn1.to_q is original and torch.equal(run(model), want)


def test_two_peft_adapters_and_deletion():
    model = WAN.build()
    handle = accelerate(model, quant=make.quantized(model))
    bare = run(model)
    model.load_lora_adapter(state(model, seed=0), adapter_name="one")
    model.load_lora_adapter(state(model, seed=1), adapter_name="two")
    model.set_adapters(["one", "two"], [0.3, 0.5])
    got = run(model)
    model.delete_adapters(["two"])
    model.set_adapters(["one"], [0.3])
    assert not torch.equal(got, run(model))
    model.unload_lora()
    assert torch.equal(run(model), bare)
    handle.undo()


def test_names_in_explain_and_files_are_those_without_wrappers():
    model = WAN.build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.load_lora_adapter(state(model), adapter_name="one")
    with accelerate(model, quant="rtn") as handle:
        assert [row["layer"] for row in handle.explain().linears] == names
