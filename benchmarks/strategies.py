"""Steps per second, peak memory and bytes of state per rank, by strategy: raw torch, lite, and the peers.

For each number of processes one job is started, in which all contenders train in turn, a few steps each, over and over.
So what else the machine does falls on all alike, and a round's ratio to raw is of neighbouring moments; the table has
the medians over the rounds, and how far they may be off ("+-": 1.57 IQR / sqrt(rounds), the notch of a box plot;
source: McGill et al., 1978, https://doi.org/10.1080/00031305.1978.10479236). "cpu" is the same ratio in processor time,
which waiting for a busy machine does not touch.
On GPUs, processes take one each.

Bytes of state are this rank's parameters, gradients, buffers and optimizer state between two steps; the peak is what a
step has at its most, by torch's profiler on the CPU, by `max_memory_allocated` on a GPU. Both are of rank 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.strategy_contenders import LENGTH, TENSOR_PARALLEL, VOCABULARY, Contender, contenders

ROWS = ("ddp", "ddp zero", "fsdp", "tp", "fsdp x tp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="default all that fit")
    parser.add_argument("--repeats", type=int, help="rounds, default 40, and 120 where processes share cores")
    parser.add_argument("--steps", type=int, default=5, help="steps of each contender in a round, default 5")
    parser.add_argument("--batch-size", type=int, default=8, help="of each process, default 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    results = []
    for world_size in options.processes:
        results += run_job(world_size, options)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def run_job(world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes, and print and return what rank 0 has measured."""
    rows = [row for row in options.rows if row != "fsdp x tp" or world_size > TENSOR_PARALLEL]
    rows = [row for row in rows if row != "tp" or world_size == TENSOR_PARALLEL]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        mp.spawn(_work, (world_size, port, rows, options, answer), nprocs=world_size)
        results = json.loads(answer.read_text())
    for row in rows:
        _print_row(row, world_size, [result for result in results if result["row"] == row])
    return results


def _print_row(row: str, world_size: int, results: list[dict[str, Any]]) -> None:
    print(f"\n{row}, {world_size} processes")
    print(f"  {'':<12}{'steps/s':>9}{'of raw':>8}{'+-':>8}{'cpu':>8}{'state MB':>10}{'of raw':>8}{'peak MB':>9}")
    for result in results:
        if "problem" in result:
            print(f"  {result['name']:<12}{result['problem']}")
            continue
        print(
            f"  {result['name']:<12}{result['steps_per_s']:>9.2f}{result['speed_ratio']:>8.3f}{result['margin']:>8.3f}"
            f"{result['cpu_ratio']:>8.3f}{result['state_bytes'] / 1e6:>10.3f}{result['state_ratio']:>8.3f}"
            f"{result['peak_bytes'] / 1e6:>9.3f}"
        )
    sys.stdout.flush()


# ---- in each process


def _work(rank: int, world_size: int, port: int, rows: list[str], options: argparse.Namespace, answer: Path) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in here.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    on_gpu = torch.cuda.device_count() >= world_size
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world_size)
    results = [result for row in rows for result in _measure(row, device, world_size, options)]
    if rank == 0:
        answer.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _measure(row: str, device: torch.device, world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    if row in ("tp", "fsdp x tp"):  # the ranks of a group get the same samples
        generator.manual_seed(dist.get_rank() // TENSOR_PARALLEL)
    tokens = torch.randint(VOCABULARY, (options.batch_size, LENGTH + 1), generator=generator).to(device)
    made: dict[str, Contender] = {}
    results: list[dict[str, Any]] = []
    for name, make in contenders().items():
        try:
            contender = make(row, device, world_size)
            if contender is not None:
                contender.step(tokens)
                made[name] = contender
        except Exception as error:  # of a peer that can't do this here; alike on all ranks
            if name in ("raw", "raw again", "lite"):
                raise
            lines = str(error).splitlines() or [""]
            results.append({"row": row, "processes": world_size, "name": name, "problem": f"does not run: {lines[0]}"})
    shares_cores = device.type == "cpu" and world_size > (os.cpu_count() or 1)
    times = _times(made, tokens, options.repeats or (120 if shares_cores else 40), options.steps)
    raw_bytes = _state_bytes(made["raw"])
    for name, contender in made.items():
        wall, cpu = times[name]
        ratios = [base / mine for mine, base in zip(wall, times["raw"][0], strict=True)]
        cpu_ratios = [base / mine for mine, base in zip(cpu, times["raw"][1], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        state_bytes = _state_bytes(contender)
        results.append(
            {
                "row": row,
                "processes": world_size,
                "device": device.type,
                "name": name,
                "steps_per_s": 1 / statistics.median(wall),
                "speed_ratio": statistics.median(ratios),
                "margin": 1.57 * (quarters[2] - quarters[0]) / math.sqrt(len(ratios)),
                "cpu_ratio": statistics.median(cpu_ratios),
                "state_bytes": state_bytes,
                "state_ratio": state_bytes / raw_bytes,
                "peak_bytes": state_bytes + _above_state(contender, tokens),
            }
        )
    return results


def _times(
    made: dict[str, Contender], tokens: Tensor, repeats: int, steps: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds per step, and seconds of processor time per step over all ranks, for each round."""
    names = list(made)
    wait: Callable[[], Any] = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for number in range(-1, repeats):  # one round more is run first, and not counted
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(steps):
                made[name].step(tokens)
            wait()
            used = torch.tensor(time.process_time() - cpu_start, device=tokens.device)
            dist.all_reduce(used)  # also waits for the slowest
            taken = time.perf_counter() - start
            if number >= 0:
                times[name][0].append(taken / steps)
                times[name][1].append(used.item() / steps)
    return times


def _state_bytes(contender: Contender) -> int:
    """Bytes of the storages that are there between two steps."""
    model = contender.model
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]
    return _bytes([*held, *(value for state in contender.optimizer.state.values() for value in state.values())])


def _bytes(values: Iterable[Any]) -> int:
    storages = {}
    for value in values:
        if isinstance(value, Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def _above_state(contender: Contender, tokens: Tensor) -> int:
    """Bytes that a step allocates above what was there before it, at most; gradients are there before and after."""
    if tokens.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step(tokens)
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _without_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contender.step(tokens)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _without_stderr() -> Iterator[None]:
    """torch 2.13's profiler tells there of its starts and stops, from C++."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


if __name__ == "__main__":
    main()
