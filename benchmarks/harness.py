"""Interleaved timing: every contender runs in every round, so that what else the machine does falls on all alike.

Processor time of this process is counted, all its threads together: waiting for a busy machine is nobody's overhead.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = Callable[[], Any]


def arguments(description: str | None, **defaults: int) -> argparse.Namespace:
    """The common command line; `defaults` are further whole numbers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def interleave(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    count: int,
    *,
    clock: Callable[[], float] = time.process_time,
    first: int = 0,
) -> dict[str, list[float]]:
    """Run each contender once per round, in turn, beginning with another one each time.

    Args:
        contenders: Functions that do `count` steps per call.
        rounds: How often each one runs; one round more is run first, and not counted.
        count: Steps per call.
        clock: Seconds; another one where other processes do the work.
        first: The position of the contender that the first round begins with.

    Returns:
        Microseconds per step, for each round.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_number in range(-1, rounds):
            shift = (first + round_number) % len(names)
            for name in names[shift:] + names[:shift]:
                start = clock()
                contenders[name]()
                taken = clock() - start
                if round_number >= 0:
                    times[name].append(taken / count * 1e6)
            gc.collect()
    finally:
        gc.enable()
    return times


def interleave_builds(
    build: Callable[[], dict[str, Callable[[], Any]]], rounds: int, count: int, *, builds: int = 10
) -> dict[str, list[float]]:
    """The same with contenders that are built anew after every few rounds.

    Where a contender's objects come to lie in memory is luck, lasts as long as they do, and makes up to 3 microseconds
    of a step of 250: of two that run the same code one is faster in all rounds. Builds average that out.

    Args:
        build: Makes the contenders.
        rounds: How often each one runs, over all builds together.
        count: Steps per call.
        builds: How often they are built.
    """
    builds = min(builds, rounds)
    times: dict[str, list[float]] = {}
    for number in range(builds):
        done, to_do = (rounds * n // builds for n in (number, number + 1))
        for name, values in interleave(build(), to_do - done, count, first=done).items():
            times.setdefault(name, []).extend(values)
    return times


def compare(title: str, times: dict[str, list[float]], base: str = "raw") -> list[dict[str, Any]]:
    """Print and return medians, and the median over the rounds of each one's ratio and difference to `base`."""
    print(f"\n{title}")
    print(f"  {'':<14}{'us/step':>10}{'IQR':>9}{'over ' + base:>12}{'ratio':>8}")
    rows = []
    for name, values in times.items():
        quarters = statistics.quantiles(values, n=4)
        over = statistics.median(v - b for v, b in zip(values, times[base], strict=True))
        ratio = statistics.median(v / b for v, b in zip(values, times[base], strict=True))
        median = statistics.median(values)
        print(f"  {name:<14}{median:>10.2f}{quarters[2] - quarters[0]:>9.2f}{over:>+12.2f}{ratio:>8.3f}")
        rows.append({"case": title, "name": name, "us": median, "over_us": over, "ratio": ratio})
    return rows


def finish(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write the rows where the user asked for them."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n")
