"""Scripts that the launcher tests run as a user would; the first argument says which."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from lite import Lite


def report(lite: Lite, folder: str) -> tuple[int, float]:
    total = lite.all_reduce(torch.tensor(1.0 + lite.global_rank), "sum").item()
    Path(folder, str(lite.global_rank)).write_text(f"{lite.world_size} {total}")
    return lite.world_size, total


def crash(lite: Lite) -> None:
    lite.barrier()
    if lite.global_rank == 1:
        raise ValueError("boom on one")
    lite.barrier()


def killed(lite: Lite) -> None:
    import os
    import signal

    lite.barrier()
    if lite.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    lite.barrier()


def wait(lite: Lite, folder: str) -> None:
    import os

    Path(folder, f"pid{lite.global_rank}").write_text(str(os.getpid()))
    time.sleep(60)


def compute(lite: Lite) -> tuple[int, int]:
    model = lite.setup(torch.nn.Linear(500, 500))
    lite.backward(model(torch.randn(256, 500)).sum())
    return lite.world_size, torch.get_num_threads()


class Train(Lite):
    """LightningLite's form."""

    def run(self, value: int) -> tuple[int, int]:
        return value, self.world_size


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "join":  # under torchrun, or by itself
        report(Lite(accelerator="cpu"), rest[0])
    elif what == "launch":
        print(Lite(accelerator="cpu", devices=2).launch(report, rest[0]))
        print(Train(accelerator="cpu", devices=2).run(5), Train(accelerator="cpu").run(6))
    elif what == "fork":  # after this process has computed with several threads
        torch.set_num_threads(2)
        layer = torch.nn.Linear(500, 500)
        layer(torch.randn(256, 500)).sum().backward()
        print(Lite(accelerator="cpu", devices=2, strategy="ddp_fork").launch(compute))
    elif what == "again":
        lite = Lite(accelerator="cpu", devices="auto" if "RANK" in __import__("os").environ else 2)
        lite.launch()
        report(lite, rest[0])
    elif what == "crash":
        Lite(accelerator="cpu", devices=2).launch(crash)
    elif what == "killed":
        Lite(accelerator="cpu", devices=2).launch(killed)
    elif what == "wait":
        Lite(accelerator="cpu", devices=2).launch(wait, rest[0])
    elif what == "wait-script":
        lite = Lite(accelerator="cpu", devices=2)
        lite.launch()
        wait(lite, rest[0])
    elif what == "contradiction":
        Lite(accelerator="cpu", devices=4)


if __name__ == "__main__":
    main()
