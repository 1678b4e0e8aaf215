"""The table that validation and test print."""

from __future__ import annotations

from collections.abc import Sequence


def print_results(results: Sequence[dict[str, float]], stage: str, names: Sequence[str] | None) -> None:
    """Print one table: a row for each metric, a column for each loader."""
    keys = list(dict.fromkeys(key for one in results for key in one))
    if not keys:
        return
    if len(results) == 1:
        heads = ["value"]
    else:
        heads = list(names) if names is not None else [f"loader {i}" for i in range(len(results))]
    width = max([len(stage) + 7, *(len(key) for key in keys)])
    columns = [max(len(head), 14) for head in heads]
    print(f"{stage + ' metric':<{width}}  " + "  ".join(f"{h:>{w}}" for h, w in zip(heads, columns, strict=True)))
    for key in keys:
        cells = [f"{one[key]:>{w}.7g}" if key in one else " " * w for one, w in zip(results, columns, strict=True)]
        print(f"{key:<{width}}  " + "  ".join(cells))
