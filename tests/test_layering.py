"""Imports go downward only; files and folders keep a size that a reader can take in."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "iet_sd"
# Lowest first. A unit (a module of iet_sd, or a folder as a whole) imports from the lines above
# its own, never from its own line: those are siblings.
LAYERS = (
    ("errors",),  # L0
    ("presets", "seeding", "files"),
    ("config",),
    ("arguments",),
    ("method", "diffusion", "devices"),  # L1
    ("data", "models"),  # L2
    ("sampling",),
    ("engine", "evaluation"),  # L3
    ("hub", "probing"),  # L4
    ("reporting",),
    ("cli",),  # L5
    ("__main__",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in FILES if path.name == "__init__.py")
MAX_LINES = 360


def module_name(path):
    """The dotted name of a file: ``iet_sd/data/shards.py`` is ``iet_sd.data.shards``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(module, tree, modules):
    """Full names of the modules imported anywhere in a file, in functions and for types too."""
    is_folder = modules[module].name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") + [""] * is_folder
            above = parts[: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base


def imports_of(module):
    return set(imports(module, ast.parse(MODULES[module].read_text("utf-8")), MODULES))


def unit_of(module):
    """``data`` of ``iet_sd.data.shards``; empty for iet_sd itself."""
    return [*module.split("."), ""][1]


def is_ours(module):
    return module.split(".")[0] == PACKAGE.name


def faults(module, imported):
    """What is wrong with the imports of one module, as texts."""
    unit = unit_of(module)
    for name in sorted(filter(is_ours, imported)):
        other = unit_of(name)
        if other != unit and not LEVEL.get(other, -1) < LEVEL[unit]:
            kind = "sideways" if LEVEL.get(other) == LEVEL[unit] else "upward"
            yield f"{module} imports {name}: {kind}"


def cycle(graph):
    """Some modules that import each other in a circle, or []."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph.get(module, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


def test_every_module_has_a_layer():
    assert {unit_of(module) for module in MODULES} - {""} == set(LEVEL)
    assert len(LEVEL) == sum(map(len, LAYERS))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module):
    if module == PACKAGE.name:
        assert not imports_of(module)
    else:
        assert list(faults(module, imports_of(module))) == []


def test_no_circular_import():
    graph = {module: set(filter(is_ours, imports_of(module))) for module in MODULES}
    assert cycle(graph) == []


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if unit_of(m) == "method"])
def test_the_method_knows_tensors_alone(module):
    ours = {name for name in imports_of(module) if unit_of(name) == "method"}
    others = {name.split(".")[0] for name in imports_of(module) - ours}
    assert others <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES


def test_folders_are_flat_and_not_nearly_empty():
    assert max(len(path.relative_to(PACKAGE).parts) for path in FILES) <= 2
    for folder in {path.parent for path in FILES}:
        assert folder in FOLDERS, f"{folder} has no __init__.py"
        assert len(list(folder.glob("*.py"))) > 3, f"{folder} has fewer than three modules"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import iet_sd.cli.train", {"iet_sd.cli.train"}),
        ("from iet_sd import hub", {"iet_sd.hub"}),
        ("from iet_sd.hub import write_card", {"iet_sd.hub"}),
        ("from iet_sd.data import shards", {"iet_sd.data.shards"}),
        ("def f():\n    from iet_sd.models.loading import x", {"iet_sd.models.loading"}),
        ("if TYPE_CHECKING:\n    import iet_sd.cli.train", {"iet_sd.cli.train"}),
        ("from . import shards", {"iet_sd.data.shards"}),
        ("from .shards import split", {"iet_sd.data.shards"}),
        ("from ..models import loading", {"iet_sd.models.loading"}),
    ],
)
def test_the_walk_sees_every_kind_of_import(text, found):
    assert set(imports("iet_sd.data.sources", ast.parse(text), MODULES)) == found


def test_the_walk_tells_upward_sideways_and_circular():
    assert list(faults("iet_sd.data.sources", {"iet_sd.models.loading"})) == [
        "iet_sd.data.sources imports iet_sd.models.loading: sideways"
    ]
    assert list(faults("iet_sd.data.sources", {"iet_sd.engine.step"})) == [
        "iet_sd.data.sources imports iet_sd.engine.step: upward"
    ]
    assert list(faults("iet_sd.data.sources", {"iet_sd.data.checks", "iet_sd.config", "os"})) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []
