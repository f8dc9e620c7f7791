"""``vdit quantize``, and ``--quant`` of the commands that sample."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from vdit_cli_tiny import PROMPT

from vdit_ext import quantizing
from vdit_ext.cli import options
from vdit_ext.integrations import accelerate
from vdit_ext.integrations.quantizer import quantized_layers
from vdit_ext.quant import files, methods

RTN = ("quantize", "toy", "--method", "rtn")
CALIBRATED = ("quantize", "toy", "--method", "smoothquant", "--steps", "2", "--rows", "16")
KEYS = {"model", "method", "bits", "settings", "seed", "prompts", "layers", "kept"}
KEYS |= {"bytes", "bytes_bf16", "seconds", "out", "average_weight_bits"}
LAYER_KEYS = {"layer", "model", "kind", "format", "bits", "fewest_bits", "bytes", "bytes_bf16"}
LAYER_KEYS |= {"weight_snr", "output_snr"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(f"# for the tests\n{PROMPT}\n\na green square falls over plain brown\n")
    return path


def test_the_names_of_methods_are_those_of_the_table():
    assert set(options.QUANT_METHODS) == set(methods.METHODS)


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_layers_are_written_and_serve_accelerate(vdit, tiny, tmp_path, bits):
    result = vdit(*RTN, "--bits", bits, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [files.SETTINGS, files.LAYERS]
    lines = result.stdout.splitlines()
    assert lines[0].strip() == f"rtn {bits}, toy model" and "blocks.*.attn1.to_q" in result.stdout
    assert (
        lines[-1].startswith(f"rtn {bits} on the toy model: 20 linears in ")
        and "7 linears in high" in lines[-1]
    )
    with accelerate(tiny.model, quant=tmp_path / "new"):
        assert len(quantized_layers(tiny.model)) == 20
    assert tiny.calls == 0  # nothing is sampled for a method that does not calibrate


def test_json_is_one_object_with_the_documented_keys(vdit, tiny, prompts, tmp_path):
    result = vdit(*CALIBRATED, "--prompts", prompts, "--out", tmp_path / "new", "--json", "--set", "alpha=0.4")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert set(record) == KEYS and {frozenset(row) for row in record["layers"]} == {frozenset(LAYER_KEYS)}
    assert record["settings"] == {"alpha": 0.4} and record["bits"] == methods.METHODS["smoothquant"].bits[0]
    assert record["prompts"] == [PROMPT, "a green square falls over plain brown"]
    assert min(row["weight_snr"] for row in record["layers"]) > 30
    assert min(row["output_snr"] for row in record["layers"]) > 25
    assert record["bytes_bf16"] > 1.85 * record["bytes"]
    assert record["kept"]["transformer"]["proj_out"] == "output head"
    assert tiny.calls == 2
    assert files.read_settings(tmp_path / "new")["info"]["run"]["layers"] == record["layers"]


def test_progress_and_notes_go_to_stderr(vdit, tmp_path):
    result = vdit(*CALIBRATED, "--out", tmp_path / "new")
    assert "calibrate: 8 of 8 in" in result.stderr and "smoothquant: 20 of 20 in" in result.stderr
    assert f"Written: {tmp_path / 'new'}" in result.stderr
    assert vdit(*RTN, "--out", tmp_path / "other", "--quiet").stderr == ""


def interrupted(vdit, monkeypatch, *arguments, after: int = 1):
    """Run the command until so many blocks are finished."""
    keep = quantizing._Partial.keep_block
    kept = []

    def keep_some(self, component, block, quantized):
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(block)
        keep(self, component, block, quantized)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing._Partial, "keep_block", keep_some)
        return vdit(*arguments)


def test_an_interrupted_run_goes_on_where_it_was(vdit, tiny, tmp_path, monkeypatch):
    once = vdit(*CALIBRATED, "--out", tmp_path / "once", "--json")
    calls = tiny.calls
    out = tmp_path / "new"
    result = interrupted(vdit, monkeypatch, *CALIBRATED, "--out", out)
    assert result.exit_code == 130 and "--resume goes on" in result.stderr and result.stdout == ""
    assert sorted(p.name for p in out.iterdir()) == [quantizing.PARTIAL]
    before = tiny.calls
    assert before == 2 * calls
    done = []
    run = quantizing.run
    monkeypatch.setattr(quantizing, "run", lambda *a, **k: done.append(k["layers"][0].block) or run(*a, **k))
    result = vdit(*CALIBRATED, "--out", out, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert done == ["blocks.1"] and tiny.calls == before  # neither block 0 nor the calibration again
    assert sorted(p.name for p in out.iterdir()) == [files.SETTINGS, files.LAYERS]
    first, second = json.loads(once.stdout), json.loads(result.stdout)
    assert first["layers"] == second["layers"]
    one, other = files.load(tmp_path / "once"), files.load(out)
    for name, layer in one.layers.items():
        assert all(torch.equal(t, other.layers[name].tensors()[key]) for key, t in layer.tensors().items())


def test_a_method_that_keeps_its_own_checkpoints_goes_on_too(vdit, tmp_path, monkeypatch):
    short = ("--steps", "1", "--rows", "16", "--set", "steps=2", "--set", "codebook_steps=2", "--json")
    arguments = ("quantize", "toy", "--method", "vq4dit", *short)
    once = json.loads(vdit(*arguments, "--out", tmp_path / "once").stdout)
    out, note, noted = tmp_path / "new", quantizing._Partial.note, []

    def note_some(self):
        note(self)
        noted.append(self.folder)
        if len(noted) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantizing._Partial, "note", note_some)
        assert vdit(*arguments, "--out", out).exit_code == 130
    partial = out / quantizing.PARTIAL
    assert any((partial / "transformer" / "checkpoint").iterdir())
    spent = json.loads((partial / "run.json").read_text())["seconds"]
    again = json.loads(vdit(*arguments, "--out", out, "--resume").stdout)
    assert again["layers"] == once["layers"] and again["seconds"] > spent and not partial.exists()


def test_a_finished_run_is_reported_by_resume(vdit, tmp_path):
    first = json.loads(vdit(*RTN, "--out", tmp_path / "new", "--json").stdout)
    again = json.loads(vdit(*RTN, "--out", tmp_path / "new", "--json", "--resume").stdout)
    assert again == first  # seconds included: nothing was done
    other = json.loads(vdit(*RTN, "--bits", "w4a8", "--out", tmp_path / "new", "--json", "--resume").stdout)
    assert other["bits"] == "w4a8" and files.read_settings(tmp_path / "new")["info"]["bits"] == "w4a8"


def test_a_kept_calibration_serves_other_bits_and_methods(vdit, refused, tiny, tmp_path):
    kept = ("--calibration", tmp_path / "calibration")
    first = vdit(*CALIBRATED, *kept, "--out", tmp_path / "first", "--json")
    assert first.exit_code == 0, first.stderr
    calls = tiny.calls
    again = json.loads(vdit(*CALIBRATED, *kept, "--out", tmp_path / "again", "--json").stdout)
    assert again["layers"] == json.loads(first.stdout)["layers"]
    other = ("quantize", "toy", "--method", "vidit_q", "--bits", "w4a8", *CALIBRATED[4:], *kept)
    result = vdit(*other, "--out", tmp_path / "other")
    assert result.exit_code == 0 and "calibrate" not in result.stderr, result.stderr
    assert tiny.calls == calls
    refused(vdit(*other, "--seed", "5", "--out", tmp_path / "new"), "a calibration with seed 5", "made with 0")
    assert not (tmp_path / "new").exists()
    about = tmp_path / "calibration" / "transformer" / "calibration.json"
    about.write_text(about.read_text()[:100])
    refused(vdit(*other, "--out", tmp_path / "new"), "must be a calibration, they are damaged")
    refused(
        vdit(*RTN, *kept, "--out", tmp_path / "new"), "--calibration: a method that calibrates was expected"
    )


MIXED = ("quantize", "toy", "--bits", "w4a8-mp", "--steps", "4", "--rows", "16", "--average-bits", "6")


def test_a_measured_map_keeps_to_its_budget_and_is_taken_up_again(vdit, refused, tiny, tmp_path, monkeypatch):
    once = vdit(*MIXED, "--out", tmp_path / "once", "--json")
    assert once.exit_code == 0, once.stderr
    record = json.loads(once.stdout)
    assert 5 <= record["average_weight_bits"]["transformer"] <= 6
    calls, out, keep = tiny.calls, tmp_path / "new", quantizing._Losses.__setitem__

    def keep_some(self, clip, loss):
        if len(self) == 5:
            raise KeyboardInterrupt
        keep(self, clip, loss)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing._Losses, "__setitem__", keep_some)
        assert vdit(*MIXED, "--out", out).exit_code == 130
    before = tiny.calls
    result = vdit(*MIXED, "--out", out, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "bits a weight) on the toy model" in result.stdout and "measure: " in result.stderr
    refused(vdit(*MIXED[:-1], "9", "--out", tmp_path / "no"), "--average-bits: 4 to 8 was expected, got 9")
    # Neither the calibration nor the five losses anew; the two clips that they are measured against are.
    assert tiny.calls - before == calls - len(quantizing.TOY_PROMPTS) - 5
    assert files.load(out).intervals == files.load(tmp_path / "once").intervals


def test_an_unfinished_run_is_not_overwritten(vdit, refused, tmp_path, monkeypatch):
    out = tmp_path / "new"
    interrupted(vdit, monkeypatch, *RTN, "--out", out)
    refused(vdit(*RTN, "--out", out), "no unfinished run was expected", "--resume")
    refused(
        vdit(*RTN, "--out", out, "--resume", "--seed", "3"),
        "--resume: seed must be as in the unfinished run (0)",
    )
    (out / quantizing.PARTIAL / "run.json").write_text("{")
    refused(vdit(*RTN, "--out", out, "--resume"), "it is damaged; remove ", quantizing.PARTIAL)


def test_a_run_that_finished_nothing_is_not_in_the_way(vdit, tmp_path, monkeypatch):
    out = tmp_path / "new"
    assert interrupted(vdit, monkeypatch, *RTN, "--out", out, after=0).exit_code == 130
    assert (out / quantizing.PARTIAL).is_dir()
    assert vdit(*RTN, "--out", out, "--seed", "3").exit_code == 0 and not (out / quantizing.PARTIAL).exists()


def test_other_weights_do_not_resume(vdit, tiny, refused, tmp_path, monkeypatch):
    out = tmp_path / "new"
    interrupted(vdit, monkeypatch, *RTN, "--out", out)
    tiny.model.blocks[1].attn1.to_q.weight.data[-1, -1] += 1
    refused(vdit(*RTN, "--out", out, "--resume"), "--resume: weights must be as in the unfinished run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "best"), ("--method: one of vidit_q", "got 'best'")),
        (("--bits", "w1a8"), ("bits of rtn must be one of", "got 'w1a8'")),
        (("--set", "alpha=1"), ("--set: a setting of rtn was expected (", "got 'alpha'")),
        (("--set", "clip"), ("--set: name=value was expected",)),
        (("--layers", "nothing"), ("layers= must match linears of WanTransformer3DModel",)),
        (("--device", "cuda"), ("the toy model runs in float32 on the CPU",)),
        (("--set", "clip=all"), ("clip one of minmax, mse, got",)),
        (("--steps", "2"), ("--steps: a method that calibrates was expected, rtn does not",)),
        (("--size", "32x32"), ("--size: a method that calibrates was expected, rtn does not",)),
        (("--average-bits", "6"), ("--average-bits: method vidit_q with bits w4a8-mp", "got rtn with w8a8")),
        (("--measure-whole",), ("--measure-whole: --average-bits was expected with it",)),
    ],
)
def test_bad_input_is_one_sentence(vdit, refused, tmp_path, arguments, words):
    refused(vdit(*RTN, *arguments, "--out", tmp_path / "new"), *words)
    assert not (tmp_path / "new").exists()


def test_a_setting_refused_after_the_calibration_leaves_nothing(vdit, tmp_path):
    out = tmp_path / "new"
    arguments = ("quantize", "toy", "--bits", "w4a8", "--steps", "1", "--rows", "4", "--quiet", "--out", out)
    result = vdit(*arguments, "--set", "alpha=much")
    assert result.exit_code == 2 and 'alpha must be a number, "auto"' in result.stderr
    assert not out.exists()  # so that the mended command is not taken for a second run
    assert vdit(*arguments, "--set", "alpha=0.5").exit_code == 0


def test_bad_prompts_are_one_sentence(vdit, refused, tmp_path, prompts):
    out = ("--out", tmp_path / "new")
    refused(vdit(*RTN, *out, "--prompts", prompts), "a method that calibrates was expected, rtn does not")
    refused(vdit(*CALIBRATED, *out, "--prompts", tmp_path / "none"), "none' was expected to be readable")
    prompts.write_text("\n# only this\n")
    refused(vdit(*CALIBRATED, *out, "--prompts", prompts), "at least one prompt was expected")
    prompts.write_text("a purple cow\n")
    refused(vdit(*CALIBRATED, *out, "--prompts", prompts), "expected a shape")
    prompts.write_bytes(b"\xff\xfe\x00")
    refused(vdit(*CALIBRATED, *out, "--prompts", prompts), "a text file in UTF-8 was expected")
    assert not (tmp_path / "new").exists()


def test_bad_models_are_one_sentence(vdit, refused, tmp_path, prompts):
    def call(*more):
        return vdit("quantize", tmp_path / "model", "--out", tmp_path / "new", "--device", "cpu", *more)

    refused(call("--method", "rtn"), 'MODEL must be "toy" or a folder')
    refused(call("--prompts", prompts), 'MODEL must be "toy" or a folder')
    (tmp_path / "model").mkdir()
    refused(call("--method", "rtn"), "has neither a model_index.json with one nor a config.json")
    config = tmp_path / "model" / "config.json"
    config.write_text("[]")
    refused(call("--method", "rtn"), "must hold a JSON object, got list")
    config.write_text('{"_class_name": "NoModel"}')
    refused(call("--method", "rtn"), "must hold a model of diffusers", "got NoModel")
    config.write_text('{"quantization_config": {}}')
    refused(call("--method", "rtn"), "is quantized already")
    refused(call(), "--prompts: a file of prompts was expected for vidit_q")


def test_an_unwritable_folder_is_refused_before_any_work(vdit, tiny, refused, tmp_path):
    refused(vdit(*CALIBRATED, "--out", tmp_path / "a" / "b"), "make it with mkdir -p")
    (tmp_path / "file").touch()
    refused(vdit(*CALIBRATED, "--out", tmp_path / "file"), "is a file")
    assert tiny.calls == 0


def test_a_missing_package_is_named_before_loading(vdit, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(vdit(*RTN, "--out", tmp_path / "new"), " transformers;", "pip install 'vdit-ext[video]'")


# -- folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A saved transformer of diffusers, and a pipeline folder with two of them."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    sizes = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4)
    sizes |= dict(text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    torch.manual_seed(0)
    models = [WanTransformer3DModel(**sizes) for _ in range(2)]
    folder = tmp_path_factory.mktemp("models")
    models[0].save_pretrained(folder / "transformer")
    parts = dict(tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
    pipe = WanPipeline(**parts, transformer=models[0], transformer_2=models[1], boundary_ratio=0.5)
    pipe.save_pretrained(folder / "pipe")
    return folder


def test_a_transformer_folder_becomes_one_that_from_pretrained_loads(vdit, wan, tmp_path):
    from diffusers import WanTransformer3DModel

    result = vdit(
        "quantize", wan / "transformer", "--method", "rtn", "--out", tmp_path / "new", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"config.json", files.SETTINGS, files.WHOLE}
    assert len(quantized_layers(WanTransformer3DModel.from_pretrained(tmp_path / "new"))) == 20
    again = vdit("quantize", tmp_path / "new", "--method", "rtn", "--out", tmp_path / "x", "--device", "cpu")
    assert again.exit_code == 2 and "is quantized already" in again.stderr


def test_the_model_itself_is_not_overwritten(vdit, wan, refused):
    before = {path: path.read_bytes() for path in wan.rglob("*") if path.is_file()}
    for name in ("transformer", "pipe"):
        result = vdit("quantize", wan / name, "--method", "rtn", "--out", wan / name, "--device", "cpu")
        refused(result, "must not hold a model that is not quantized, it has config.json; name another folder")
    assert {path: path.read_bytes() for path in wan.rglob("*") if path.is_file()} == before


def test_a_misspelt_model_is_named_before_prompts_are_asked_for(vdit, refused, tmp_path):
    refused(vdit("quantize", "toyy", "--out", tmp_path / "new"), 'MODEL must be "toy" or a folder', "'toyy'")


def test_a_pipeline_with_two_transformers_becomes_a_folder_each(vdit, wan, tmp_path):
    from diffusers import WanPipeline

    result = vdit(
        "quantize", wan / "pipe", "--method", "rtn", "--out", tmp_path / "new", "--device", "cpu", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert {row["model"] for row in json.loads(result.stdout)["layers"]} == {"transformer", "transformer_2"}
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["transformer", "transformer_2"]
    pipe = WanPipeline.from_pretrained(wan / "pipe", tokenizer=None, text_encoder=None, vae=None)
    with accelerate(pipe, quant=tmp_path / "new"):
        for model in (pipe.transformer, pipe.transformer_2):
            assert len(quantized_layers(model)) == 20


def test_a_method_that_calibrates_needs_a_pipeline(vdit, wan, refused, prompts, tmp_path):
    call = ("quantize", wan / "transformer", "--prompts", prompts, "--out", tmp_path / "new", "--device", "cpu")
    refused(vdit(*call), "MODEL must be a pipeline folder for vidit_q", "got a transformer alone")


# -- sampling with quantized linears -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "svg2"])
def test_generate_with_quantized_linears(vdit, tmp_path, method):
    assert vdit(*RTN, "--bits", "w4a8", "--out", tmp_path / "layers", "--quiet").exit_code == 0
    arguments = (
        "generate",
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--method",
        method,
        "--out",
        tmp_path / "clip.mp4",
    )
    record = json.loads(vdit(*arguments, "--quant", tmp_path / "layers", "--json").stdout)
    assert record["method"] == f"{method}+rtn-w4a8" and record["quant"] == "rtn-w4a8"
    assert record["identical"] is False and 10 < record["psnr"] < 60
    line = vdit(*arguments, "--quant", tmp_path / "layers").stdout
    assert line.startswith(f"{method}+rtn-w4a8 on the toy model: density ") and " PSNR " in line


def test_wider_linears_are_nearer(vdit, tmp_path):
    psnr = {}
    for bits in ("w8a8", "w4a8"):
        vdit(*RTN, "--bits", bits, "--out", tmp_path / bits, "--quiet")
        arguments = (
            "generate",
            "--prompt",
            PROMPT,
            "--steps",
            "2",
            "--method",
            "dense",
            "--quant",
            tmp_path / bits,
        )
        psnr[bits] = json.loads(vdit(*arguments, "--out", tmp_path / "clip.mp4", "--json").stdout)["psnr"]
    assert psnr["w8a8"] > psnr["w4a8"] + 6


def test_compare_runs_every_method_both_ways(vdit, tmp_path):
    arguments = (
        "compare",
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--methods",
        "draft",
        "--quant",
        "rtn",
        "--json",
    )
    records = json.loads(vdit(*arguments, "--out", tmp_path / "out").stdout)
    assert [r["method"] for r in records] == ["dense", "draft", "dense+rtn-w8a8", "draft+rtn-w8a8"]
    assert [r["quant"] for r in records] == [None, None, "rtn-w8a8", "rtn-w8a8"]
    assert records[0]["identical"] and not records[2]["identical"]
    assert (tmp_path / "out" / "draft+rtn-w8a8.mp4").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "dense+rtn-w8a8" in page


@pytest.mark.parametrize(
    ("quant", "word"),
    [
        ("nothing", "or rtn, was expected, got 'nothing'"),
        (".", "must hold vdit_quant.json"),
        ("vidit_q", "calibrat"),
    ],
)
def test_bad_quantized_linears_are_one_sentence(vdit, tiny, refused, tmp_path, quant, word):
    arguments = ("generate", "--prompt", PROMPT, "--steps", "2", "--out", tmp_path / "clip.mp4")
    refused(vdit(*arguments, "--quant", quant), word)
    assert tiny.calls == 0 and not list(tmp_path.iterdir())


def test_layers_of_another_model_are_refused_before_sampling(vdit, tiny, wan, refused, tmp_path):
    vdit(
        "quantize",
        wan / "transformer",
        "--method",
        "rtn",
        "--out",
        tmp_path / "q",
        "--device",
        "cpu",
        "--quiet",
    )
    arguments = ("generate", "--prompt", PROMPT, "--steps", "2", "--out", tmp_path / "clip.mp4")
    refused(vdit(*arguments, "--quant", tmp_path / "q"), "the layers belong to another model")
    assert tiny.calls == 0
