"""`python -m lite checkpoint`: what is in a checkpoint, whether it is whole, what differs, sharded to one file."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from lite.checkpoint import tree
from lite.checkpoint.file import save_file
from lite.checkpoint.manifest import KEY
from lite.checkpoint.reading import damage, read
from lite.errors import CheckpointError


def add_to(rooms: Any) -> None:
    """Add the command and its verbs to the parser."""
    parser = rooms.add_parser("checkpoint", help=__doc__, description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for run, words, paths in (
        (show, "names, shapes, dtypes, bytes, and who wrote it", ["PATH+"]),
        (verify, "whether it is whole; exit code 1 if one is not", ["PATH+"]),
        (diff, "which entries differ; exit code 1 if any does", ["A", "B"]),
        (consolidate, "write a directory's content to one file", ["DIRECTORY", "FILE"]),
    ):
        verb = verbs.add_parser(run.__name__, help=words, description=words)
        for path in paths:
            many = path.endswith("+")
            verb.add_argument(path.rstrip("+").lower(), metavar=path.rstrip("+"), nargs="+" if many else None)
        if run is not verify:
            verb.add_argument("--no-verify", action="store_true", help="don't compare checksums first")
        verb.set_defaults(run=run)


def show(options: argparse.Namespace) -> int:
    """Print every entry of each checkpoint."""
    for path in options.path:
        content, manifest = read(path, verify=not options.no_verify)
        print(f"{path}: {_about(manifest)}")
        total = 0
        for name, value in tree.walk(content).items():
            if isinstance(value, Tensor):
                total += value.nbytes
                print(f"  {name}  {_shape(value)}  {value.nbytes} bytes")
            else:
                print(f"  {name} = {_brief(value)}")
        print(f"  {total} bytes in tensors")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Print whether each checkpoint is whole."""
    code = 0
    for path in options.path:
        try:
            problem = damage(path)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        print(f"{path}: " + ("whole" if problem is None else f"NOT WHOLE: {' '.join(problem.split())}"))
        code = code if problem is None else 1
    return code


def diff(options: argparse.Namespace) -> int:
    """Print what differs between two checkpoints, whatever their formats."""
    sides = [tree.walk(read(path, verify=not options.no_verify)[0]) for path in (options.a, options.b)]
    lines = [f"only in {path}: {name}" for path, here, there in (
        (options.a, sides[0], sides[1]),
        (options.b, sides[1], sides[0]),
    ) for name in here if name not in there]  # fmt: skip
    for name in (name for name in sides[0] if name in sides[1]):
        found = difference(sides[0][name], sides[1][name])
        if found is not None:
            lines.append(f"{name}: {found}")
    print("\n".join(lines) if lines else "no difference")
    return 1 if lines else 0


def consolidate(options: argparse.Namespace) -> int:
    """Write one file with what a directory holds."""
    content, manifest = read(options.directory, verify=not options.no_verify)
    save_file(options.file, {**content, **({KEY: manifest} if manifest else {})})
    print(f"{options.file}: written")
    return 0


def difference(a: Any, b: Any) -> str | None:
    """How two entries differ, or None. Not-a-numbers equal each other, in tensors and in plain values.

    Example:
        >>> difference(torch.zeros(2), torch.tensor([0.0, 0.5]))
        'max abs difference 0.5 in 1 of 2 elements'
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if _same(a, b) else f"{_brief(a)} and {_brief(b)}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{_shape(a)} and {_shape(b)}"
    wide = torch.complex128 if a.is_complex() else torch.float64
    wide = torch.int64 if not (a.is_floating_point() or a.is_complex()) else wide
    x, y = ((value.dequantize() if value.is_quantized else value.to_dense()).to(wide) for value in (a, b))
    differs = (x != y) & ~(x.isnan() & y.isnan())
    if not differs.any():
        return None
    largest = (x - y).abs()[differs].max().item()
    return f"max abs difference {largest:.6g} in {int(differs.sum())} of {a.numel()} elements"


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (set, frozenset)):
        numbers = [{x for x in side if x == x} for side in (a, b)]  # a NaN is not what it is
        return numbers[0] == numbers[1] and len(a) == len(b)
    if isinstance(a, complex):
        return _same(a.real, b.real) and _same(a.imag, b.imag)
    return bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _brief(value: Any) -> str:
    """In at most 80 characters."""
    text = _shape(value) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _about(manifest: dict[str, Any]) -> str:
    if not manifest:
        return "no manifest; not saved by lite"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.get("time", 0)))
    return (
        f"format {manifest['format']}, saved {when} by lite {manifest.get('lite')} with torch {manifest.get('torch')} "
        f"on {manifest.get('world_size')} process(es)"
    )
