"""Seconds that a training loop is blocked by saving, peak extra memory, and load time, of a model with Adam.

torch.save, torch.distributed.checkpoint (DCP), lite, and Fabric and Accelerate where they are installed; on one process
and on two. Every contender overwrites its own checkpoint, once per round and in another order each time: memory that
one has freed makes the next one's page cache faster, and memory that it has taken, slower. "blocked" leaves fsync out,
which stands beside it: lite and DCP wait for the disk, the others don't. Background saves are waited for between the
timings; their first one, which allocates the copy, is not counted, and "extra memory" is what comes on top of what is
held between saves.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import shutil
import socket
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn

from benchmarks.harness import arguments, finish
from lite import Lite

Save = Callable[[], Any]
_fsync_s = 0.0


class Contender:
    """A way to save: the call that blocks, and what is waited for after it."""

    def __init__(self, save: Save, settle: Callable[[Any], Any] = lambda result: None) -> None:
        self.save, self.settle = save, settle


def training_state(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an Adam that has stepped, together about so large."""
    layers = max(1, round(megabytes * 1e6 / 12 / (1024 * 2048)))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 2048) for _ in range(layers)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def contenders(folder: Path, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Contender]:
    """Every one that can run here."""
    lite = Lite(accelerator="cpu")
    state = {"model": model, "optimizer": optimizer, "step": 1}

    def plain() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}

    def torch_save() -> None:
        if rank == 0:
            torch.save(plain(), folder / "torch.ckpt")
        dist.barrier()

    def lite_save(name: str, **options: Any) -> Contender:
        return Contender(lambda: lite.save(folder / name, state, **options), lambda _: lite.wait_for_save())

    found = {
        "torch.save": Contender(torch_save),
        "torch.save again": Contender(torch_save),
        "DCP save": Contender(lambda: dcp.save(plain(), checkpoint_id=folder / "dcp")),
        "DCP async_save": Contender(
            lambda: dcp.async_save(plain(), checkpoint_id=folder / "dcp_async"), lambda future: future.result()
        ),
        "lite file": lite_save("lite.ckpt"),
        "lite directory": lite_save("lite"),
        "lite file async": lite_save("lite_async.ckpt", async_save=True),
        "lite directory async": lite_save("lite_async", async_save=True),
    }
    if importlib.util.find_spec("lightning") is not None:
        found["Fabric"] = fabric(folder, model, optimizer)
    if importlib.util.find_spec("accelerate") is not None:
        found["Accelerate"] = accelerate(folder, model, optimizer)
    return found


def fabric(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """Lightning Fabric; it saves what it has not set up as it is."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    rank = dist.get_rank()

    def save() -> None:
        if rank == 0:
            fabric.save(folder / "fabric.ckpt", {"model": model, "optimizer": optimizer, "step": 1})
        dist.barrier()

    return Contender(save)


def accelerate(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Contender:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    # Prepared without wrapping, which would add a prefix and gradient buckets to the others' model.
    accelerator._models.append(model)
    accelerator._optimizers.append(accelerator.prepare_optimizer(optimizer))
    return Contender(lambda: accelerator.save_state(str(folder / "accelerate")))


def loads(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    """Reading back, into the model and the optimizer."""
    lite = Lite(accelerator="cpu")
    state = {"model": model, "optimizer": optimizer, "step": 1}

    def torch_load() -> None:
        content = torch.load(folder / "torch.ckpt", map_location="cpu", weights_only=True)
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])

    def dcp_load() -> None:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
        dcp.load(content, checkpoint_id=folder / "dcp")

    return {
        "torch.load": torch_load,
        "DCP load": dcp_load,
        "lite file": lambda: lite.load(folder / "lite.ckpt", state),
        "lite file, verify=False": lambda: lite.load(folder / "lite.ckpt", state, verify=False),
        "lite directory": lambda: lite.load(folder / "lite", state),
        "lite directory, verify=False": lambda: lite.load(folder / "lite", state, verify=False),
    }


def blocked(run: Save) -> tuple[float, float, Any]:
    """Seconds in all, seconds of fsync in this thread, and what `run` returned."""
    global _fsync_s
    _fsync_s = 0.0
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, _fsync_s, result


def peak_bytes(run: Save, settle: Callable[[Any], Any]) -> int:
    """How much more memory was resident at the most, while it ran and settled; Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    settle(run())
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _time_fsync() -> None:
    real, main = os.fsync, threading.main_thread()

    def fsync(descriptor: int) -> None:
        global _fsync_s
        start = time.perf_counter()
        real(descriptor)
        if threading.current_thread() is main:
            _fsync_s += time.perf_counter() - start

    os.fsync = fsync


def work(rank: int, world_size: int, port: int, folder: str, repeats: int, megabytes: int, answers: Any) -> None:
    """One process of one run; rank 0 puts its rows into `answers`."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    _time_fsync()
    model, optimizer = training_state(megabytes)
    size = sum(p.nbytes for p in model.parameters()) * 3
    found = contenders(Path(folder), rank, model, optimizer)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for number in range(-1, repeats):
        for name in random.Random(number).sample(list(found), len(found)):  # alike on all ranks
            contender = found[name]
            gc.collect()
            os.sync() if rank == 0 else None  # what the one before left, in memory or to be written, is not this one's
            dist.barrier()
            seconds, fsync_s, result = blocked(contender.save)
            contender.settle(result)
            slowest = torch.tensor([seconds, fsync_s])
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if number >= 0:  # a rank waits for another one's fsync, too
                times[name].append((slowest[0].item() - slowest[1].item(), slowest[1].item()))
    peaks = {name: peak_bytes(c.save, c.settle) for name, c in found.items()}
    dist.barrier()
    load_times: dict[str, list[float]] = {}
    for number in range(-1, max(1, repeats // 2)):
        for name, load in loads(Path(folder), model, optimizer).items():
            dist.barrier()
            seconds, _, _ = blocked(load)
            if number >= 0:
                load_times.setdefault(name, []).append(seconds)
    if rank == 0:
        answers.put((size, times, peaks, load_times))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, repeats: int, megabytes: int) -> list[dict[str, Any]]:
    """Run and print one table of saving and one of loading."""
    folder = tempfile.mkdtemp(prefix="lite_benchmark_")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    try:
        mp.start_processes(work, (world_size, port, folder, repeats, megabytes, answers), nprocs=world_size)
        size, times, peaks, load_times = answers.get()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"{size / 1e6:.0f} MB on {world_size} process{'es' if world_size > 1 else ''}"
    print(f"\nsave {title}\n  {'':<22}{'blocked s':>11}{'fsync s':>9}{'of torch.save':>15}{'extra memory':>14}")
    rows = []
    for name, values in times.items():
        seconds, fsync_s = (statistics.median(column) for column in zip(*values, strict=True))
        ratio = statistics.median(v[0] / b[0] for v, b in zip(values, times["torch.save"], strict=True))
        extra = peaks[name] / size
        print(f"  {name:<22}{seconds:>11.3f}{fsync_s:>9.3f}{ratio:>15.2f}{extra:>13.0%}")
        row = {"case": f"save {title}", "name": name, "blocked_s": seconds, "fsync_s": fsync_s, "ratio": ratio}
        rows.append({**row, "peak_over_state": extra})
    print(f"load {title}\n  {'':<30}{'s':>7}")
    for name, seconds_each in load_times.items():
        print(f"  {name:<30}{statistics.median(seconds_each):>7.3f}")
        rows.append({"case": f"load {title}", "name": name, "s": statistics.median(seconds_each)})
    return rows


def main() -> None:
    options = arguments(__doc__, repeats=9, megabytes=400)
    rows = []
    for world_size in (1, 2):
        rows += measure(world_size, options.repeats, options.megabytes)
    finish(rows, options.json)


if __name__ == "__main__":
    main()
