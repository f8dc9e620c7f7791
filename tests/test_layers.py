"""The arrow of the house plan: a module imports only from its right."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vdit_ext

ROOT = Path(vdit_ext.__file__).parent
# Left may import right, never the other way. Names on one level may import each other.
ORDER = [["cli"], ["pipelines"], ["integrations", "models", "toyworld"], ["sparse", "quant", "ssm"], ["ops"]]
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names}


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of the package that a module imports, wherever in the file."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "vdit_ext"]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = node.module.split(".") if node.module else []
            names = [[*base, *module, a.name] for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vdit_ext":
            names = [[*node.module.split(".")[1:], a.name] for a in node.names]
        found |= {n[0] for n in names if n}
    return found & set(LEVEL)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_the_right(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part not in LEVEL:
        pytest.skip("not part of the arrow: the package's own root, or a helper for tests")
    wrong = {name for name in imported_parts(path) if LEVEL[name] < LEVEL[part]}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which stand to its left"
