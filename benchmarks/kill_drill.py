"""Kill a run at random moments, start it again until it ends, and compare it bit for bit with one that was left alone.

    python -m benchmarks.kill_drill --rounds 30

The run has what makes resuming hard: random augmentation in two loader workers, dropout, a loss scale, a scheduler.
In turn all of its processes get SIGKILL, or one of them, whichever (the one that writes included): at a random moment,
or during a save of a file, in the background, or of a directory that all ranks write.
`--loop trainer` has the Trainer in the raw loop's place, killed in training, in validation, between and during a save.
`--launcher torchrun` starts each life by torchrun instead of a fork of this process, which is the same but slower.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lite import Lite

KINDS = (
    "all",
    "one",
    "all during a save",
    "one during a save",
    "all during a background save",
    "one during a background save",
    "all during a sharded save",
    "one during a sharded background save",
)
NUM_SAMPLES, GLOBAL_BATCH, EPOCHS, NUM_WORKERS = 560, 8, 3, 2
STEPS = EPOCHS * (NUM_SAMPLES // GLOBAL_BATCH)
EVERY_STEPS = 5
LIFE_TIMEOUT_S = 120


class Augmented(Dataset[Tensor]):
    """Samples with noise from all three generators."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.rand(6) + random.random() + float(np.random.rand())
        return torch.cat([torch.full((2,), index / NUM_SAMPLES), noise])


class Net(nn.Module):
    """Large enough that saving takes a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.Linear(256, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def job(folder: str, async_save: bool, sharded: bool = False) -> None:
    """One life of the run: from its newest checkpoint to its end, or until it is killed."""
    lite = Lite(accelerator="cpu", precision="16-mixed")
    rank = lite.global_rank
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    lite.seed_everything(3)
    torch.manual_seed(3 + rank)  # dropout differs between ranks
    batch_size = GLOBAL_BATCH // lite.world_size
    loader = DataLoader(Augmented(), batch_size=batch_size, shuffle=True, num_workers=NUM_WORKERS, drop_last=True)
    loader = lite.setup_dataloaders(loader)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
    lite.setup(model, optimizer, scheduler)
    losses: list[float] = []
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "losses": losses}
    checkpoints = f"{folder}/checkpoints"
    run = lite.resumable(state, checkpoints, every_steps=EVERY_STEPS, async_save=async_save, sharded=sharded)
    losses = state["losses"]  # type: ignore[assignment]
    for _ in run.epochs(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss = (model(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()
            lite.backward(loss)
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()
            losses.append(lite.all_reduce(loss.detach()).item())
            Path(folder, f"begun-{rank}").touch()
            run.step()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    if lite.is_global_zero:
        result = {"losses": losses, "weights": hashlib.sha256(weights).hexdigest(), "lr": scheduler.get_last_lr()}
        Path(folder, "result.partial").write_text(json.dumps(result))
        Path(folder, "result.partial").rename(Path(folder, "result"))


def live(loop: str, folder: str, async_save: bool, sharded: bool) -> None:
    """One life of the run, by the raw loop or the Trainer."""
    if loop == "trainer":
        from benchmarks import kill_drill_trainer

        kill_drill_trainer.job(folder)
    else:
        job(folder, async_save, sharded)


class Life:
    """The processes of one life of the run."""

    def __init__(self, folder: Path, num_processes: int, launcher: str, kind: str, loop: str) -> None:
        self.folder = folder
        for mark in [*folder.glob("pid-*"), *folder.glob("begun-*"), *folder.glob("phase")]:
            mark.unlink()
        self._ranks = range(num_processes)
        self._children: list[int] = []
        self._torchrun: subprocess.Popen[bytes] | None = None
        port = free_port()
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
            command += [f"--master-port={port}", "-m", "benchmarks.kill_drill", "--life", str(folder)]
            command += ["--loop", loop]
            command += ["--background"] if "background" in kind else []
            command += ["--sharded"] if "sharded" in kind else []
            with open(folder / "log", "ab") as log:
                self._torchrun = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            return
        for rank in self._ranks:
            child = os.fork()
            if child == 0:
                self._be(rank, port, kind, loop)
            self._children.append(child)

    def _be(self, rank: int, port: int, kind: str, loop: str) -> None:
        code = 1
        try:
            os.setsid()
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            world = len(self._ranks)
            if world > 1:
                names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                os.environ.update(zip(names, map(str, (rank, rank, world, world, "127.0.0.1", port)), strict=True))
            live(loop, str(self.folder), "background" in kind, "sharded" in kind)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def pids(self) -> dict[int, int]:
        """The processes that train, by rank, as far as they have begun."""
        found = {}
        for rank in self._ranks:
            mark = self.folder / f"pid-{rank}"
            text = mark.read_text() if mark.exists() else ""
            found |= {rank: int(text)} if text else {}
        return found

    def has_begun(self) -> bool:
        return all((self.folder / f"begun-{rank}").exists() for rank in self._ranks)

    def ended(self) -> bool:
        """Whether all processes are gone."""
        if self._torchrun is not None:
            return self._torchrun.poll() is not None
        self._children = [c for c in self._children if os.waitpid(c, os.WNOHANG)[0] == 0]
        return not self._children

    def kill(self, which: str, chance: random.Random) -> list[int]:
        """SIGKILL to all ranks or to one; the ranks that it has reached."""
        pids = self.pids()
        reached = []
        for rank in pids if which == "all" else [chance.choice(list(pids))]:
            try:
                os.killpg(pids[rank], signal.SIGKILL) if self._torchrun is None else os.kill(pids[rank], signal.SIGKILL)
            except ProcessLookupError:
                continue
            reached.append(rank)
        return reached

    def wait(self) -> None:
        """Until all processes are gone; a survivor that hangs is an error."""
        end = time.monotonic() + LIFE_TIMEOUT_S
        while not self.ended():
            if time.monotonic() > end:
                self.kill("all", random.Random())
                raise TimeoutError(f"a process went on for {LIFE_TIMEOUT_S} s; see {self.folder / 'log'}")
            time.sleep(0.01)


def drill(
    folder: Path, num_processes: int, launcher: str, kind: str | None, seed: int, kills: int, loop: str
) -> dict[str, Any]:
    """One round: the run with up to `kills` kills of a kind (None: none), what came out of it, and who was killed."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    done: list[list[int]] = []
    while not (folder / "result").exists():
        life = Life(folder, num_processes, launcher, kind or "", loop)
        if kind is not None and len(done) < kills and _moment(life, kind, chance):
            reached = life.kill(kind.split()[0], chance)
            done += [reached] if reached else []
            life.wait()
        else:
            life.wait()
            if not (folder / "result").exists():
                raise RuntimeError(f"the run ended without a kill and without a result; see {folder / 'log'}")
    result: dict[str, Any] = json.loads((folder / "result").read_text())
    return {**result, "kills": done}


def _moment(life: Life, kind: str, chance: random.Random) -> bool:
    """Wait for the moment to kill; False when the run has ended before."""
    while not life.has_begun():
        if life.ended():
            return False
        time.sleep(0.002)
    time.sleep(chance.random() * 0.6)
    # What a save holds while it writes; a killed one may have left some, which the next save removes.
    phase = kind.split()[-1]
    while phase in ("training", "validation", "between") and _phase(life) != phase:
        if life.ended():
            return False
        time.sleep(0.0002)
    traces = f"{life.folder}/checkpoints/" + ("step-*/lite-*.lock" if "sharded" in kind else ".*.tmp")
    before = set(glob.glob(traces))
    while "save" in kind and not set(glob.glob(traces)) - before:
        if life.ended():
            return False
        time.sleep(0.0002)
    return not life.ended()


def _phase(life: Life) -> str:
    """What the Trainer does, as it says."""
    mark = life.folder / "phase"
    return mark.read_text() if mark.exists() else ""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def rounds(
    count: int, num_processes: int, launcher: str, seed: int, kills: int, folder: Path, loop: str = "raw"
) -> Iterator[tuple[str, list[list[int]], bool]]:
    """Yield each round's kind, whom each kill reached, and whether it came out as the run that was left alone."""
    kinds: Sequence[str] = KINDS
    if loop == "trainer":
        from benchmarks.kill_drill_trainer import KINDS as TRAINER_KINDS

        kinds = TRAINER_KINDS
    if num_processes == 1:
        kinds = [kind for kind in kinds if not kind.startswith("one")]
    alone = drill(folder / "alone", num_processes, launcher, None, seed, 0, loop)
    assert loop == "trainer" or len(alone["losses"]) == STEPS
    for number in range(count):
        kind = kinds[number % len(kinds)]
        result = drill(folder / str(number), num_processes, launcher, kind, seed + number, kills, loop)
        same = all(result[name] == alone[name] for name in ("losses", "weights", "lr"))
        yield kind, result["kills"], same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="for each number of processes, default 30")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--loop", choices=["raw", "trainer"], default="raw")
    parser.add_argument("--launcher", choices=["fork", "torchrun"], default="fork")
    parser.add_argument("--seed", type=int, help="of the moments and victims; a new one by default")
    parser.add_argument("--kills", type=int, default=3, help="in each round at most, default 3")
    parser.add_argument("--life", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--background", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.loop == "trainer":  # once, instead of in each life
        pass
    if args.life:
        live(args.loop, args.life, args.background, args.sharded)
        return
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"seed {seed}: --seed {seed} chooses these moments and victims again", flush=True)
    failed = 0
    for num_processes in args.processes:
        with tempfile.TemporaryDirectory(prefix="kill-drill-") as folder:
            begun = time.monotonic()
            done = rounds(args.rounds, num_processes, args.launcher, seed, args.kills, Path(folder), args.loop)
            outcomes = list(_tell(done))
        kills, bad = sum(len(k) for _, k, _ in outcomes), sum(not same for _, _, same in outcomes)
        spared = sum(not k for _, k, _ in outcomes)
        failed += bad + (kills == 0)
        print(
            f"{num_processes} process(es): {len(outcomes) - bad} of {len(outcomes)} rounds equal to the uninterrupted "
            f"run bit for bit, {kills} kills, {time.monotonic() - begun:.0f} s"
            + (f"; {spared} rounds without a kill show nothing" if spared else "")
        )
        if not kills:
            print("no kill came in time, so nothing was tested", file=sys.stderr)
    sys.exit(1 if failed else 0)


def _tell(outcomes: Iterator[tuple[str, list[list[int]], bool]]) -> Iterator[tuple[str, list[list[int]], bool]]:
    for number, (kind, kills, same) in enumerate(outcomes):
        whom = ", ".join(" and ".join(map(str, ranks)) for ranks in kills) or "nobody"
        print(f"  round {number}: {kind}, killed ranks {whom}: {'equal' if same else 'DIFFERENT'}", flush=True)
        yield kind, kills, same


if __name__ == "__main__":
    main()
