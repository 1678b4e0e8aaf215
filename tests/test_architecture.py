"""The house: what may import what, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LITE = Path(__file__).resolve().parents[1] / "lite"
LAYERS = [
    {"errors", "disguise"},
    {"renewal", "swapped"},
    {"state", "seed", "nesting", "agreement", "first_rank", "storage"},
    {"sharded"},
    {"fitting"},
    {"loading"},
    {"collectives"},
    {"launchers", "environments", "accelerators", "precision", "checkpoint", "loggers", "data"},
    {"recording"},
    {"deferred", "elsewhere"},
    {"strategies", "wrapping"},
    {"ema", "gradients", "guards", "prepared", "pipeline"},
    {"memory", "plan", "resumable"},
    {"facets"},
    {"lite"},
    {"trainer"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(LITE.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(LITE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[str]:
    """Every module of lite that the file imports anywhere, lazily and for type checking too."""
    known = {module_name(f) for f in FILES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lite")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lite":
            assert node.level == 0
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_module_imports_only_what_stands_below_it(file: Path) -> None:
    """Layers; within a layer the packages don't know each other, but that wrapping takes an Engine from strategies."""
    mine = module_name(file)
    if mine == "lite":
        return
    room = mine.split(".")[1]
    for other in imports(file):
        theirs = other.split(".")[1] if "." in other else None
        assert theirs is not None, f"{mine} imports the package's facade"
        if theirs == room or (room, theirs) == ("wrapping", "strategies"):
            continue
        assert LEVEL[theirs] < LEVEL[room], f"{mine} imports {other}"


def test_there_are_no_cycles() -> None:
    """Between modules, lazy imports included."""
    graph = {module_name(f): set(imports(f)) - {module_name(f)} for f in FILES}
    graph.pop("lite")
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done or name not in graph:
            return
        for other in graph[name]:
            # A package's facade imports its own modules; they don't import it.
            visit(other, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_are_named_after_what_is_in_them_and_say_so(file: Path) -> None:
    """No drawers for odds and ends; each opens with its purpose."""
    assert file.stem not in {"utils", "util", "misc", "common", "helpers", "helper"}
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_importing_lite_patches_nothing() -> None:
    """Functions and classes of torch are the same objects before and after."""
    code = (
        "import torch, torch.utils.data as d, torch.optim.lr_scheduler as s; "
        "parts = lambda: [torch.compile, d.DataLoader.__init__, d.DataLoader.__iter__, torch.nn.Module.__call__, "
        "torch.optim.Optimizer.__init__, torch.optim.SGD.step, s.LRScheduler.__init__, torch.Tensor.backward, "
        "torch.get_rng_state, torch.load, torch.save]; "
        "before = parts(); import lite; assert before == parts()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=LITE.parent)


def test_importing_lite_brings_nothing_but_lite() -> None:
    """No trainer, nothing beyond torch, numpy and the standard library, fewer than 60 modules."""
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import lite; "
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=LITE.parent)
    added = done.stdout.split()
    assert not [m for m in added if m.startswith(("lite.trainer", "lite.cli"))]
    foreign = {m.split(".")[0] for m in added} - {"lite", "torch", "numpy"} - set(sys.stdlib_module_names)
    assert not foreign
    assert len(added) < 60, added
