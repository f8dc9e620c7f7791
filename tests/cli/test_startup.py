"""Answers that need no torch come without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vdit_ext

# The command's modules alone: what `import vdit_ext` itself loads is not theirs to decide.
ALONE = """
import sys, types
package = types.ModuleType("vdit_ext")
package.__path__ = [{path!r}]
sys.modules["vdit_ext"] = package
from vdit_ext.cli import app
try:
    app({arguments!r}, prog_name="vdit")
except SystemExit as end:
    code = end.code
heavy = {{"torch", "numpy", "diffusers", "av", "PIL", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def alone(*arguments):
    script = ALONE.format(path=str(Path(vdit_ext.__file__).parent), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", ["generate", "compare", "curve", "bench", "doctor", None])
def test_help_needs_no_torch_and_has_the_exit_codes(command):
    result = alone(*([command] if command else []), "--help")
    assert result.returncode == 0, result.stderr
    assert "Exit codes" in result.stdout and "130" in result.stdout


# What an installer writes as bin/vdit: the package's own __init__ goes by the name of the script.
SCRIPT = """
import sys
from vdit_ext.cli import main
assert sys.argv[0].endswith("/vdit"), sys.argv
try:
    main()
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("--version",)])
def test_the_console_script_answers_without_torch(tmp_path, arguments):
    script = tmp_path / "vdit"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(vdit_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert result.returncode == 0, result.stderr
    assert "vdit" in result.stdout


def test_a_misspelt_method_is_refused_without_torch(tmp_path):
    result = alone("generate", "--prompt", "x", "--out", str(tmp_path / "a.mp4"), "--method", "svg3")
    assert result.returncode == 2 and "'svg3'" in result.stderr


def test_names_of_methods_are_those_there_are():
    from vdit_ext.cli.options import METHOD_NAMES
    from vdit_ext.sparse import METHODS

    assert set(METHOD_NAMES) == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--out", "a.mp4"), ("--prompt", "vdit generate --help")),
        (("generate", "--seeed", "1"), ("--seeed",)),
        (("compare", "--seed", "-1"), ("--seed",)),
        (("bench", "--tokens", "many"), ("--tokens",)),
        (("paint",), ("paint", "vdit --help")),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments, words):
    result = alone(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("vdit: ")
    assert all(word in result.stderr for word in words), result.stderr


def test_no_command_prints_the_help_and_version_its_line():
    assert "generate" in alone().stdout and alone().returncode == 0
    assert alone("--version").stdout.startswith("vdit-ext ")
