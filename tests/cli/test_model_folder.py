"""``--model``: a diffusers Wan pipeline from a folder, here a random one of a few hundred kilobytes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from typer.testing import CliRunner

from vdit_ext.cli import app
from vdit_ext.video import read_video

TEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline; frames 48 by 32 pixels make tokens of 3 by 2 a latent frame."""
    pytest.importorskip("accelerate")  # without it diffusers loads no Wan model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "cat"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=8, d_model=TEXT, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    path = tmp_path_factory.mktemp("models") / "wan"
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    ).save_pretrained(path)
    return path


def generate(folder, out, *more):
    arguments = ["generate", "--model", str(folder), "--prompt", "a cat", "--out", str(out), "--steps", "3"]
    return CliRunner().invoke(app, [*arguments, "--device", "cpu", *map(str, more)])


def test_clip_from_a_folder(folder, tmp_path):
    settings = ("--size", "48x32", "--frames", "5", "--set", "num_q_clusters=4", "--set", "num_k_clusters=6")
    result = generate(folder, tmp_path / "clip.mp4", *settings, "--set", "dense_step_fraction=0.4", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["model"] == "wan" and record["settings"]["num_k_clusters"] == 6
    assert (record["frames"], record["height"], record["width"], record["fps"]) == (5, 32, 48, 16)
    assert 0 < record["density"] <= 1 and record["seconds_dense"] > 0
    assert read_video(tmp_path / "clip.mp4")[0].shape[0] == 5


def test_a_pipeline_calibrates_on_its_own_clips(folder, tmp_path):
    """From a folder to quantized layers to a clip."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    layers = tmp_path / "layers"
    sizes = ("--size", "48x32", "--frames", "5", "--device", "cpu")
    arguments = ["quantize", str(folder), "--method", "vidit_q", "--bits", "w4a8-mp", "--steps", "2", *sizes]
    arguments += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(layers), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["model"] == "wan" and record["prompts"] == ["a cat"]
    assert {row["fewest_bits"] for row in record["layers"] if row["kind"] == "self"} == {4}
    assert {row["fewest_bits"] for row in record["layers"] if row["kind"] == "ffn"} == {8}
    assert min(row["output_snr"] for row in record["layers"]) > 10
    result = generate(
        folder, tmp_path / "clip.mp4", *sizes[:4], "--method", "dense", "--quant", layers, "--json"
    )
    assert result.exit_code == 0, result.stderr
    clip = json.loads(result.stdout)
    assert clip["method"] == "dense+vidit_q-w4a8-mp" and clip["psnr"] > 15
    assert WanTransformer3DModel.from_pretrained(layers).config.num_layers == 2


def test_fps_is_16_unless_given(folder, tmp_path):
    from vdit_ext.cli import options
    from vdit_ext.cli.console import Reporter

    for given, expected in ((None, 16), (24.0, 24.0)):
        sampler = options.load_sampler(folder, None, "cpu", Reporter(quiet=True), fps=given)
        assert sampler.fps == expected


def test_a_missing_accelerate_is_said_before_loading(folder, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    refused(generate(folder, tmp_path / "clip.mp4"), " accelerate;", "pip install 'vdit-ext[video]'")


def test_what_the_pipeline_refuses_is_refused_before_sampling(folder, tmp_path, refused, monkeypatch):
    def check_inputs(_self, prompt, height, width, guidance_scale_2=None):
        raise ValueError(f"not {prompt} of {height} by {width}, {guidance_scale_2}")

    monkeypatch.setattr(WanPipeline, "check_inputs", check_inputs)
    refused(generate(folder, tmp_path / "clip.mp4"), "not a cat of 480 by 832, None")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("--size", "50x32"), "16"),
        (("--frames", "6"), "multiple of 4"),
        (("--device", "tpu"), "tpu"),
        (("--dtype", "int3"), "int3"),
        (("--top-p", "2"), "top_p"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, refused, change, word):
    refused(generate(folder, tmp_path / "clip.mp4", *change), word)
    assert not list(tmp_path.iterdir())
