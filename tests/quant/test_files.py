"""Quantized layers on disk: the round trip, and one sentence for everything that is wrong with a file."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from cases import quantized as make
from cases.transformers import CASES
from safetensors.torch import load_file, save_file

from vdit_ext.quant import files

WAN = next(case for case in CASES if case.name == "WanTransformer3DModel")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return WAN.build()


def assert_equal(first, second) -> None:
    assert first.method == second.method and list(first.layers) == list(second.layers)
    assert first.intervals == second.intervals and dict(first.report) == dict(second.report)
    for name, layer in first.layers.items():
        other = second.layers[name]
        assert layer.config() == other.config()
        assert all(torch.equal(t, other.tensors()[key]) for key, t in layer.tensors().items())


@pytest.mark.parametrize("kind", ["int8", "int4", "planes", "masked"])
def test_round_trip_is_exact(model, kind, tmp_path):
    before = make.quantized(model, kind)
    files.save(tmp_path / "new", before, info={"bits": "w8a8"})
    assert_equal(files.load(tmp_path / "new"), before)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [files.SETTINGS, files.LAYERS]
    assert files.read_settings(tmp_path / "new")["info"] == {"bits": "w8a8"}


def test_an_earlier_run_is_replaced_and_other_files_stay(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    files.save(tmp_path, make.quantized(model, "int8"))
    files.save(tmp_path, make.quantized(model, "int4"))
    assert {layer.weight.format for layer in files.load(tmp_path).layers.values()} == {"int4"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", files.SETTINGS, files.LAYERS]


def test_files_of_the_other_kind_do_not_stay(model, tmp_path):
    def names():
        return {p.name for p in tmp_path.iterdir()}

    layers, whole = {files.SETTINGS, files.LAYERS}, {files.SETTINGS, files.WHOLE, files.CONFIG}
    quantized = make.quantized(model)
    files.save(tmp_path, quantized)
    assert names() == layers
    files.save(tmp_path, quantized, rest={"norm": torch.ones(2)}, config={})
    assert names() == whole
    files.save(tmp_path, quantized)
    assert names() == layers


def test_another_models_files_are_not_replaced(model, tmp_path):
    (tmp_path / files.CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="must not hold a model that is not quantized, it has config.json"):
        files.save(tmp_path, make.quantized(model), rest={}, config={"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == [files.CONFIG]
    assert (tmp_path / files.CONFIG).read_text() == "{}"


def test_nothing_half_written_when_the_report_is_no_json(model, tmp_path):
    good = make.quantized(model)
    bad = type(good)("nearest", good.layers, (), {"snr": float("nan")})
    with pytest.raises(ValueError, match="report and info must be what JSON can hold"):
        files.save(tmp_path / "new", bad)
    assert not (tmp_path / "new").exists()


def test_nothing_half_written_when_writing_fails(model, tmp_path, monkeypatch):
    files.save(tmp_path, make.quantized(model))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        files.save(tmp_path, make.quantized(model, "int4"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def edit(folder, change) -> None:
    path = folder / files.SETTINGS
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def drop(settings) -> None:
    del settings["layers"]["blocks.0.ffn.net.2"]["input"]


LAYER = "blocks.1.attn1.to_q"
DAMAGES = {
    "version": (lambda s: s.update(version=99), r"must be of format version 1, got 99"),
    "other json": (lambda s: s.update(format="x"), r'must say "format": "vdit_ext quantized layers"'),
    "no method": (lambda s: s.pop("method"), r"method must be str, got nothing"),
    "layer is a list": (lambda s: s["layers"].update({LAYER: []}), rf"layers\.{LAYER} must be dict, got list"),
    "no input": (drop, r"settings of blocks\.0\.ffn\.net\.2 .* must be those of a quantized layer"),
    "format": (lambda s: s["layers"][LAYER].update(format="int5"), r"format must be one of int8, .*got 'int5'"),
    "size": (
        lambda s: s["layers"][LAYER].update(in_features=32),
        rf"{LAYER}: codes must be int8 \[24, 32\], got",
    ),
    "bias": (
        lambda s: s["layers"][LAYER].update(has_bias=False),
        rf"{LAYER}: the tensors must be .*got bias too",
    ),
    "layer": (lambda s: s["layers"].update({"blocks.9.x": s["layers"][LAYER]}), r"blocks\.9\.x: .*is missing"),
    "bit map": (lambda s: s.update(intervals=[{LAYER: 5}]), rf"{LAYER} must have 8 bits in a bit map, got 5"),
    "bits": (lambda s: s.update(intervals=[{LAYER: "8"}]), r"intervals must hold whole numbers"),
    "tensors": (lambda s: s.update(tensors="../x.safetensors"), r"tensors must be vdit_quant\.safetensors or"),
    "other run": (lambda s: s.update(id="0"), r"must be of the same run as vdit_quant\.json \(0\)"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_damaged_settings_are_one_sentence(model, tmp_path, damage):
    change, expected = DAMAGES[damage]
    files.save(tmp_path, make.quantized(model))
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=expected) as caught:
        files.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_sentence(model, tmp_path):
    files.save(tmp_path, make.quantized(model))
    path = tmp_path / files.LAYERS
    for size in (path.stat().st_size - 7, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="must be a whole safetensors file, it is not") as caught:
            files.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_tensors_of_another_dtype_are_one_sentence(model, tmp_path):
    files.save(tmp_path, make.quantized(model))
    path = tmp_path / files.LAYERS
    tensors = load_file(path)
    key = f"{LAYER}.scale"
    tensors[key] = tensors[key].half()
    save_file(tensors, path, metadata={"vdit_quant": files.read_settings(tmp_path)["id"]})
    with pytest.raises(ValueError, match=rf"{LAYER}: scale must be float32 \[24\], got float16 \[24\]"):
        files.load(tmp_path)


def test_missing_files_are_one_sentence(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is expected to be a folder, there is none"):
        files.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"must hold vdit_quant\.json.*`vdit quantize`"):
        files.load(tmp_path)
    files.save(tmp_path, make.quantized(model))
    (tmp_path / files.LAYERS).unlink()
    with pytest.raises(FileNotFoundError, match=r"vdit_quant\.safetensors is expected beside"):
        files.load(tmp_path)
    (tmp_path / files.SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="must be JSON, it is not"):
        files.load(tmp_path)
