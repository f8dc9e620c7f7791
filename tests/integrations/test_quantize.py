"""``accelerate(..., quant=...)`` and loading through diffusers, on tiny random models of every class."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from cases import quantized as make
from cases.methods import Banded
from cases.transformers import CASES
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PipelineQuantizationConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file

import vdit_ext
from vdit_ext.integrations import accelerate, explain, handle_of, save_quantized
from vdit_ext.integrations.quantize import _kernel_capability
from vdit_ext.integrations.quantizer import VditQuantConfig, quantized_layers
from vdit_ext.quant import QuantLinear, files, linear_layers, methods
from vdit_ext.quant.calibration import calibrate
from vdit_ext.quant.methods import METHODS
from vdit_ext.testing import difference

WAN = next(case for case in CASES if case.name == "WanTransformer3DModel")
# Head size 24 serves the sparse kernels of the CPU; blocks of 48 channels.
WIDE = dataclasses.replace(WAN, config=WAN.config | {"attention_head_dim": 24})


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def run(model: nn.Module, case, **changes) -> torch.Tensor:
    return model(**(case.arguments() | changes), return_dict=False)[0]


def snr(got: torch.Tensor, want: torch.Tensor) -> float:
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise))


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


# -- in place, and undone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_runs_quantized_and_is_restored_exactly(case):
    model = case.build()
    want, before = run(model, case), modules(model)
    chosen = {info.name for info in linear_layers(model)}
    handle = accelerate(model, quant="rtn", num_inference_steps=4)
    assert set(quantized_layers(model)) == chosen
    got = run(model, case)
    assert not torch.equal(got, want) and snr(got, want) > 25, snr(got, want)
    handle.undo()
    assert modules(model) == before and not hasattr(model, "_diffusers_hook")
    assert torch.equal(run(model, case), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_explain_lists_every_linear(case):
    model = case.build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = linear_layers(model).kept
    with accelerate(model, quant="rtn") as handle:
        told = handle.explain().linears
        assert [row["layer"] for row in told] == names
        for row in told:
            if row["layer"] in kept:
                assert row["format"] == "float32" and kept[row["layer"]] in row["reason"]
            else:
                assert (row["format"], row["bits"], row["activations"]) == ("int8", "8", "int8")
                assert row["path"].startswith("cpu, ")
        assert explain(model).linears == told
    assert explain(model).linears == []


def test_the_table_shows_both_lists():
    model = WIDE.build()
    quantized = make.quantized(model, "planes")
    with accelerate(model, sparse=Banded(), quant=quantized, num_inference_steps=4) as handle:
        table = str(handle.explain()).splitlines()
    assert table[0].split()[:2] == ["model", "layer"] and "banded" in table[1]
    row = next(line for line in table if line.startswith("blocks.0-1.attn1.to_q "))
    assert "nibble_planes" in row and "8, 4, 4, 4 by parts of the steps" in row
    assert any(line.startswith("proj_out ") and "high precision: output head" in line for line in table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_and_quantized_in_one_call(dtype):
    model = WIDE.build().to(dtype)
    given = {key: t.to(dtype) for key, t in WIDE.arguments().items() if key != "timestep"}
    quantized = make.quantized(model)
    with accelerate(model, quant=quantized):
        dense = run(model, WIDE, **given)
    with accelerate(model, sparse=Banded(), quant=quantized) as handle:
        both = run(model, WIDE, **given)
        assert handle.stats()["sparse_calls"] == 2 and len(quantized_layers(model)) == 20
        # The method keeps everything, so that only rounding differs.
        assert difference(both, dense).cosine < (1e-5 if dtype == torch.float32 else 1e-3)
    assert both.dtype == dtype


def test_a_second_quantization_and_other_models_layers_are_refused():
    model, before = WAN.build(), None
    quantized = make.quantized(model)
    before = modules(model)
    other = make.quantized(next(c for c in CASES if c.name == "PixArtTransformer2DModel").build())
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn1\.to_q must be a layer of Wan"):
        accelerate(model, quant=other)
    wide = WIDE.build()
    with pytest.raises(ValueError, match=r"attn1\.to_q must be \[24, 24\], got \[48, 48\]"):
        accelerate(wide, quant=quantized)
    assert modules(model) == before and handle_of(model) is None and not hasattr(model, "_diffusers_hook")
    with accelerate(model, quant=quantized), pytest.raises(ValueError, match="is accelerated already"):
        accelerate(model, quant=quantized)


@pytest.mark.parametrize(
    ("quant", "kind", "expected"),
    [
        (3, TypeError, "quant must be a folder, a quantized model, .* got int"),
        ("no-such-folder", FileNotFoundError, "no-such-folder is expected to be a folder, there is none"),
        ({"transformer_3": "rtn"}, ValueError, r"must name the transformers that there are \(transformer\)"),
    ],
)
def test_what_quant_is_not(quant, kind, expected):
    model = WAN.build()
    before = modules(model)
    with pytest.raises(kind, match=expected):
        accelerate(model, quant=quant)
    assert modules(model) == before


def test_a_class_of_quantization_alone_has_no_sparse_attention():
    model = next(case for case in CASES if case.name == "PixArtTransformer2DModel").build()
    with pytest.raises(TypeError, match="must be one of WanTransformer3DModel for sparse attention"):
        accelerate(model, sparse=Banded(), quant="rtn")
    with pytest.raises(TypeError, match=r"WanTransformer3DModel, .*got Sequential"):
        accelerate(nn.Sequential(nn.Linear(4, 4)), quant="rtn")


# -- precision by parts of the sampling --------------------------------------------------------------------


def bits_of(model: nn.Module) -> dict[str, int]:
    layers = quantized_layers(model)
    names = {"self": "attn1.to_q", "ffn": "ffn.net.2"}
    return {kind: layers[f"blocks.0.{name}"].bits for kind, name in names.items()}


def test_bits_follow_the_steps_and_begin_again_with_a_new_video():
    model = WAN.build()
    seen = []
    with accelerate(model, quant=make.quantized(model, "planes"), num_inference_steps=8):
        for timestep in [900, 800, 700, 600, 500, 400, 300, 200, 900]:
            run(model, WAN, timestep=torch.full((2,), float(timestep)))
            seen.append(bits_of(model))
    eight, four = {"self": 8, "ffn": 8}, {"self": 4, "ffn": 8}
    assert seen == [eight] * 2 + [four] * 6 + [eight]


def test_mochi_counts_steps_by_a_timestep_that_rises():
    case = next(case for case in CASES if case.name == "MochiTransformer3DModel")
    model = case.build()
    seen = []
    quantized = make.quantized(model, "planes")
    with accelerate(model, quant=quantized, num_inference_steps=4):
        for timestep in [0, 250, 500, 750]:
            run(model, case, timestep=torch.full((2,), float(timestep)))
            seen.append(quantized_layers(model)["transformer_blocks.0.attn1.to_q"].bits)
    assert seen == [8, 4, 4, 4]


def test_both_precisions_run_what_their_weights_say():
    model = WAN.build()
    quantized = make.quantized(model, "planes")
    want = run(model, WAN)
    quality = []
    with accelerate(model, quant=quantized, num_inference_steps=4):
        for timestep in [900.0, 600.0]:
            got = run(model, WAN, timestep=torch.full((2,), timestep))
            accelerated = got, run(WAN.build(), WAN, timestep=torch.full((2,), timestep))
            quality.append(snr(*accelerated))
    assert quality[0] > quality[1] + 6 and torch.equal(run(model, WAN), want)


def test_a_transformer_alone_must_say_how_many_steps():
    model = WAN.build()
    before = modules(model)
    with pytest.raises(ValueError, match="num_inference_steps must be given for layers whose bits change"):
        accelerate(model, quant=make.quantized(model, "planes"))
    assert modules(model) == before


def pipeline(**experts: nn.Module) -> WanPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler)
    pipe = WanPipeline(**parts, **experts, boundary_ratio=0.5 if len(experts) > 1 else None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: WanPipeline, steps: int = 4) -> torch.Tensor:
    return pipe(
        prompt_embeds=torch.ones(1, 7, 12),
        negative_prompt_embeds=torch.zeros(1, 7, 12),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        height=32,
        width=32,
        num_frames=5,
        output_type="latent",
    ).frames


def test_both_experts_of_wan_2_2_share_the_steps():
    experts = {"transformer": WAN.build(0), "transformer_2": WAN.build(1)}
    pipe = pipeline(**experts)
    want = sample(pipe)
    quant = {name: make.quantized(model, "planes") for name, model in experts.items()}
    seen = []

    def note(module, args):
        seen.append((module is experts["transformer_2"].blocks[0], module.attn1.to_q.bits))

    hooks = [model.blocks[0].register_forward_pre_hook(note) for model in experts.values()]
    with accelerate(pipe, quant=quant) as handle:
        got = sample(pipe)
        assert {row["model"] for row in handle.explain().linears} == set(experts)
    for hook in hooks:
        hook.remove()
    assert [bits for _, bits in seen] == [8, 8, 4, 4, 4, 4, 4, 4]
    assert {second for second, _ in seen} == {False, True}
    assert snr(got, want) > 5 and torch.equal(sample(pipe), want)


def test_layers_of_one_expert_are_not_both_experts():
    experts = {"transformer": WAN.build(0), "transformer_2": WAN.build(1)}
    pipe = pipeline(**experts)
    with pytest.raises(ValueError, match=r"dict by the names of the transformers \(transformer, tr"):
        accelerate(pipe, quant=make.quantized(experts["transformer"]))
    with accelerate(pipe, quant={"transformer_2": make.quantized(experts["transformer_2"])}):
        assert not quantized_layers(experts["transformer"]) and quantized_layers(experts["transformer_2"])


def test_a_refusal_of_the_second_expert_leaves_the_first_as_it_was():
    experts = {"transformer": WAN.build(0), "transformer_2": WIDE.build(1)}
    before = modules(experts["transformer"])
    layers = make.quantized(experts["transformer"])
    with pytest.raises(ValueError, match="the layers belong to another model"):
        accelerate(pipeline(**experts), quant={"transformer": layers, "transformer_2": layers})
    assert modules(experts["transformer"]) == before


# -- folders, and loading through diffusers ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "planes", "masked"])
def test_a_folder_serves_accelerate_and_from_pretrained_alike(tmp_path, kind):
    model = WAN.build()
    quantized = make.quantized(model, kind)
    save_quantized(tmp_path, model, quantized, info={"bits": "w8a8"})
    with accelerate(model, quant=tmp_path, num_inference_steps=1):
        want = run(model, WAN)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert list(quantized_layers(loaded)) == list(quantized.layers)
    assert snr(run(loaded, WAN), want) > 50  # blocks of its own are not fused
    with accelerate(loaded, num_inference_steps=1):
        assert torch.equal(run(loaded, WAN), want)
    assert not any(parameter.is_meta for parameter in [*loaded.parameters(), *loaded.buffers()])
    shared = loaded.blocks[0].attn1
    assert shared.to_q.shared is shared.to_k.shared is not None and loaded.blocks[0].ffn.net[2].shared is None


@pytest.mark.parametrize("kind", ["int8", "planes"])
def test_an_accelerated_model_is_saved_as_what_it_is(tmp_path, kind):
    model = WAN.build()
    before = dict(model.config)
    with accelerate(model, quant=make.quantized(model, kind), num_inference_steps=1):
        want = run(model, WAN)
        model.save_pretrained(tmp_path / "quantized")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "quantized")
    with accelerate(loaded, num_inference_steps=1):
        assert torch.equal(run(loaded, WAN), want)
    assert dict(model.config) == before and not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path / "plain")
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "plain")
    assert not quantized_layers(plain) and torch.equal(run(plain, WAN), run(model, WAN))


def test_layers_alone_are_loaded_by_accelerate(tmp_path):
    model = WAN.build()
    save_quantized(tmp_path, model, make.quantized(model), whole=False)
    assert not (tmp_path / "config.json").exists()
    with accelerate(model, quant=str(tmp_path)):
        assert len(quantized_layers(model)) == 20


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_saved_and_loaded_exactly(name, tmp_path):
    """At several of its bits: the layers alone, and the whole transformer through diffusers."""
    model = WIDE.build()
    calibration = calibrate(model, lambda: run(model, WIDE), rows=64)
    quick = {"vq4dit": {"steps": 2, "codebook_steps": 2}, "lrq_dit": {"steps": 2}}.get(name, {})
    for bits in METHODS[name].bits[:4]:
        quantized = methods.run(name, model, calibration, bits=bits, **quick)
        files.save(tmp_path / "layers", quantized, info={"bits": bits})
        save_quantized(tmp_path / "whole", model, quantized, info={"bits": bits})
        with accelerate(model, quant=quantized, num_inference_steps=1):
            want = run(model, WIDE)
        with accelerate(model, quant=tmp_path / "layers", num_inference_steps=1):
            assert torch.equal(run(model, WIDE), want), bits
        loaded = WanTransformer3DModel.from_pretrained(tmp_path / "whole")
        with accelerate(loaded, num_inference_steps=1):
            assert torch.equal(run(loaded, WIDE), want), bits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_loads_quantized_weights(case, tmp_path):
    model = case.build()
    save_quantized(tmp_path, model, make.quantized(model))
    loaded = type(model).from_pretrained(tmp_path)
    with accelerate(model, quant=tmp_path), accelerate(loaded):
        assert torch.equal(run(loaded, case), run(model, case))


def test_the_explained_path_is_that_of_the_kernel_that_runs(monkeypatch):
    """A GPU of 9.0 runs the kernels for 8.0 until it is asked for the others."""
    monkeypatch.delenv("VDIT_LINEAR_KERNEL", raising=False)
    assert [_kernel_capability(device) for device in ((8, 0), (9, 0), (10, 0))] == [80, 80, 80]
    for asked in ("sm90", "sm90_always"):
        monkeypatch.setenv("VDIT_LINEAR_KERNEL", asked)
        assert [_kernel_capability(device) for device in ((8, 0), (9, 0), (10, 0))] == [80, 90, 80]


def test_scales_stay_wide_in_a_narrow_model(tmp_path):
    model = WAN.build().to(torch.bfloat16)
    save_quantized(tmp_path, model, make.quantized(model))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    layer = loaded.blocks[0].attn1.to_q
    assert isinstance(layer, QuantLinear) and layer.scale.dtype == layer.bias.dtype == torch.float32
    assert loaded.dtype == torch.bfloat16
    assert loaded.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32  # as the class wants


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_full_precision_weights_are_quantized_while_they_load(tmp_path, bits):
    model = WAN.build()
    model.save_pretrained(tmp_path / "full")
    config = VditQuantConfig(method="rtn", bits=bits)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "full", quantization_config=config)
    with accelerate(model, quant=VditQuantConfig(method="rtn", bits=bits)):
        want = run(model, WAN)
    with accelerate(loaded):
        assert torch.equal(run(loaded, WAN), want)
    loaded.save_pretrained(tmp_path / "quantized")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "quantized")
    assert torch.equal(run(again, WAN), run(loaded, WAN))
    described = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["method"], described["bits"]) == ("vdit", "rtn", bits)
    assert len(described["weights"]) == 20


@pytest.mark.parametrize("kind", ["int4", "masked"])
def test_a_folder_of_layers_is_a_quantization_config(tmp_path, kind):
    model = WAN.build()
    model.save_pretrained(tmp_path / "full")
    save_quantized(tmp_path / "layers", model, make.quantized(model, kind), whole=False)
    config = VditQuantConfig(folder=tmp_path / "layers")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "full", quantization_config=config)
    assert len(quantized_layers(loaded)) == 20
    loaded.save_pretrained(tmp_path / "again")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(run(again, WAN), run(loaded, WAN))


def test_a_sharded_quantized_model_loads(tmp_path):
    model = WAN.build()
    model.save_pretrained(tmp_path / "full")
    config = VditQuantConfig(method="rtn")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "full", quantization_config=config)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = WanTransformer3DModel.from_pretrained(tmp_path / "shards")
    assert torch.equal(run(again, WAN), run(loaded, WAN))


def test_a_pipeline_quantizes_its_transformer(tmp_path):
    pipe = pipeline(transformer=WAN.build())
    pipe.save_pretrained(tmp_path / "pipe")
    chosen = PipelineQuantizationConfig(quant_mapping={"transformer": VditQuantConfig(method="rtn")})
    loaded = WanPipeline.from_pretrained(
        tmp_path / "pipe", quantization_config=chosen, tokenizer=None, text_encoder=None, vae=None
    )
    assert len(quantized_layers(loaded.transformer)) == 20
    loaded.set_progress_bar_config(disable=True)
    assert snr(sample(loaded), sample(pipe)) > 25


def test_loaded_models_take_sparse_attention_and_follow_their_bit_map(tmp_path):
    model = WIDE.build()
    save_quantized(tmp_path, model, make.quantized(model, "planes"))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    seen = []
    with accelerate(loaded, sparse=Banded(), num_inference_steps=4) as handle:
        for timestep in [900, 600, 300, 100]:
            run(loaded, WIDE, timestep=torch.full((2,), float(timestep)))
            seen.append(bits_of(loaded)["self"])
        assert handle.stats()["sparse_calls"] == 8 and handle.explain()[0]["dtype"] == "float32"
    assert seen == [8, 4, 4, 4] and bits_of(loaded)["self"] == 8
    with pytest.raises(ValueError, match="quant must be left out for WanTransformer3DModel, whose"):
        accelerate(loaded, quant="rtn")


def test_dequantize_gives_plain_linears_back(tmp_path):
    model = WAN.build()
    save_quantized(tmp_path, model, make.quantized(model))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    want = run(loaded, WAN)
    loaded.dequantize()
    assert not quantized_layers(loaded) and type(loaded.blocks[0].attn1.to_q) is nn.Linear
    assert snr(run(loaded, WAN), want) > 30


def test_a_quantized_model_is_not_cast(tmp_path):
    model = WAN.build()
    save_quantized(tmp_path, model, make.quantized(model))
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        loaded.to(torch.bfloat16)


def damaged(folder, change) -> None:
    path = folder / files.WHOLE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


LAYER = "blocks.1.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{LAYER}.scale"), rf"{LAYER}\.scale is missing"),
        (lambda t: t.update({f"{LAYER}.scale": torch.ones(5)}), rf"{LAYER}\.scale must be \[24\] by config"),
        (lambda t: t.update({f"{LAYER}.codes": torch.ones(24, 24)}), rf"{LAYER}\.codes must be int8 .*got fl"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_damaged_models_are_one_sentence(tmp_path, change, expected):
    model = WAN.build()
    save_quantized(tmp_path, model, make.quantized(model))
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=expected) as caught:
        WanTransformer3DModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_configs_are_one_sentence(tmp_path):
    model = WAN.build()
    save_quantized(tmp_path, model, make.quantized(model))
    path = tmp_path / "config.json"
    good = path.read_text()

    def load(change):
        config = json.loads(good)
        change(config["quantization_config"])
        path.write_text(json.dumps(config))
        return WanTransformer3DModel.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match="must be of format version 1, got 7; another version"):
        load(lambda c: c.update(version=7))
    with pytest.raises(ValueError, match=rf"{LAYER} must be a linear from 32 to 24 channels"):
        load(lambda c: c["weights"][LAYER].update(in_features=32))
    with pytest.raises(ValueError, match=rf"settings of the quantized layer {LAYER}, they are damaged"):
        load(lambda c: c["weights"][LAYER].pop("input"))
    with pytest.raises(ValueError, match=r"blocks\.7\.x must be a layer of WanTransformer3DModel"):
        load(lambda c: c["weights"].update({"blocks.7.x": c["weights"][LAYER]}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "method or folder is expected, and not both, got method=None, folder=None"),
        ({"method": "rtn", "folder": "x"}, "and not both"),
        ({"method": "best"}, "method must be one of vidit_q, .*got 'best'"),
        ({"method": "smoothquant"}, "without calibration is expected here .*rtn.*, got smoothquant"),
        ({"method": "rtn", "bits": "w1a8"}, "bits of rtn must be one of w8a8, .*got 'w1a8'"),
    ],
)
def test_bad_quantization_configs_are_one_sentence(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        VditQuantConfig(**arguments)


def test_the_package_offers_the_config_and_registers_it():
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert vdit_ext.VditQuantConfig is VditQuantConfig is AUTO_QUANTIZATION_CONFIG_MAPPING["vdit"]


# -- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "planes"])
def test_regional_compile_of_quantized_blocks(kind):
    case = dataclasses.replace(WIDE, config=WIDE.config | {"num_layers": 4})
    model = case.build()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(1)
        return graph.forward

    def steps():
        return [run(model, case, timestep=torch.full((2,), float(t))) for t in (900, 700, 500, 300)]

    torch._dynamo.reset()
    with accelerate(model, sparse=Banded(), quant=make.quantized(model, kind), num_inference_steps=4) as handle:
        want = steps()
        handle.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=count)
        got = steps()
    for a, b in zip(got, want, strict=True):
        assert difference(a, b).cosine < 1e-6
    assert len(graphs) == (2 if kind == "planes" else 1)  # one for each precision
    torch._dynamo.reset()
