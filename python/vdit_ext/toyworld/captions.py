"""The grammar of captions, read and written.

    [a] <colour> <shape> <motion> over <colour> <texture>

as in "a red disc bounces over blue stripes". A plain background reads "over plain blue".
"""

import difflib

from .scene import (
    BACKGROUND_COLOURS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    THING_COLOURS,
    BackgroundSpec,
    SceneSpec,
    ThingSpec,
)

EXAMPLE = "a red disc bounces over blue stripes"

_ARTICLES = ("a", "an", "the")
# Words that people write for ours; each maps to exactly one word of the grammar.
_SYNONYMS = {"ball": "disc", "circle": "disc", "gray": "grey", "checkers": "checks", "violet": "purple"}
_VERBS = {motion.split()[0]: motion.split()[1:] for motion in MOTIONS}


def caption(spec: SceneSpec) -> str:
    """Canonical sentence of a spec; `parse(caption(spec)) == spec` for a spec with one thing."""
    things = " and ".join(f"a {thing.colour} {thing.shape} {thing.motion}" for thing in spec.things)
    colour, texture = spec.background.colour, spec.background.texture
    over = f"plain {colour}" if texture == "plain" else f"{colour} {texture}"
    return f"{things} over {over}"


def parse(prompt: str) -> SceneSpec:
    """Read a prompt. Raises ValueError with one sentence that names the first unknown word."""
    words = _Words(prompt)
    words.skip(_ARTICLES)
    colour = words.take("a colour", THING_COLOURS)
    shape = words.take("a shape", SHAPES)
    motion = _take_motion(words)
    words.take('the word "over"', ("over",))
    words.skip(_ARTICLES)
    background = _take_background(words)
    words.end()
    return SceneSpec((ThingSpec(colour, shape, motion),), background)


def _take_motion(words: "_Words") -> str:
    verb = words.take("a motion", tuple(_VERBS))
    sides = tuple(m.split()[1] for m in MOTIONS if m.split()[0] == verb and " " in m)
    if not sides:
        return verb
    words.skip(("to", "the"))
    return f"{verb} {words.take('a direction', sides)}"


def _take_background(words: "_Words") -> BackgroundSpec:
    first = words.take("a background colour", (*BACKGROUND_COLOURS, "plain"))
    if first == "plain":
        return BackgroundSpec(words.take("a background colour", BACKGROUND_COLOURS), "plain")
    return BackgroundSpec(first, words.take("a texture", TEXTURES))


class _Words:
    """The words of a prompt, taken from the left."""

    def __init__(self, prompt: str):
        if not isinstance(prompt, str):
            raise ValueError(f'expected a prompt such as "{EXAMPLE}", got {type(prompt).__name__}')
        plain = "".join(c if c.isalnum() else " " for c in prompt.lower())
        self.words = [_SYNONYMS.get(word, word) for word in plain.split()]

    def skip(self, accepted) -> None:
        while self.words and self.words[0] in accepted:
            self.words.pop(0)

    def take(self, what: str, accepted) -> str:
        came = self.words.pop(0) if self.words else None
        if came in accepted:
            return came
        choices = ", ".join(accepted)
        if came is None:
            raise ValueError(f'expected {what} ({choices}) but the prompt ended, as in "{EXAMPLE}"')
        near = difflib.get_close_matches(came, accepted, n=1)
        hint = f', did you mean "{near[0]}"?' if near else f', as in "{EXAMPLE}"'
        raise ValueError(f'expected {what} ({choices}) but got "{came}"{hint}')

    def end(self) -> None:
        if self.words:
            more = self.words[0]
            raise ValueError(f'expected an end after the background but got "{more}", as in "{EXAMPLE}"')
