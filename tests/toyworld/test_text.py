import pytest
import torch

from vdit_ext.toyworld import scene, text


def test_the_vocabulary_has_every_word_of_the_world_once():
    words = " ".join(
        [*scene.THING_COLOURS, *scene.BACKGROUND_COLOURS, *scene.SHAPES, *scene.MOTIONS, *scene.TEXTURES]
    )
    assert set(words.split()) | {"a", "over"} == set(text.VOCABULARY)
    assert len(set(text.VOCABULARY)) == len(text.VOCABULARY) <= text.WORD_SLOTS


def test_codes_differ_for_different_prompts_and_agree_for_synonyms():
    codes = text.encode(
        [
            "a red disc bounces over blue stripes",
            "the red ball bounces over blue stripes",
            "a blue disc bounces over blue stripes",
            "",
        ]
    )
    assert codes.shape == (4, text.MAX_TOKENS, text.TEXT_DIM)
    assert codes.dtype == torch.float32
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    assert codes[3, :, : text.WORD_SLOTS].abs().sum() == 0


def test_a_prompt_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="zebra"):
        text.encode(["a red zebra bounces over blue stripes"])
