"""A save that is killed at any moment leaves a whole checkpoint: the old one or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_python

# Forked children save checkpoint after checkpoint in one place, each with one number in all of its tensors, and are
# killed. Forks, because a new interpreter would need seconds to come to its first save.
SCRIPT = """
import os, random, signal, sys, time, torch
from lite import Lite

path, how = sys.argv[1:]
torch.set_num_threads(1)
lite = Lite(accelerator="cpu")
generator = random.Random(path + how)

def content(number):
    return {**{f"w{i}": torch.full((200_000,), float(number)) for i in range(5)}, "number": number}

def child(start, heard):
    for number in range(start, start + 10_000):
        lite.save(path, content(number), async_save=how == "async")
        os.write(heard, b"%d " % number)

lite.save(path, content(0))
start, between, last = 1, 0, 0
for _ in range(12):
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(start, writes)
    os.close(writes)
    said = os.read(reads, 100)
    time.sleep(generator.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reads, "rb") as rest:
        heard = [int(n) for n in (said + rest.read()).split()]
    found = lite.load(path)
    number = found.pop("number")
    # In the background the last one that was begun need not be there yet.
    sure = heard if how == "sync" else [last, *heard][:-1]
    assert number >= sure[-1], (number, heard)
    last = number
    assert len(found) == 5 and all(torch.equal(w, torch.full((200_000,), float(number))) for w in found.values())
    folder = os.path.dirname(path) if path.endswith(".ckpt") else path
    between += len(os.listdir(folder)) > (1 if path.endswith(".ckpt") else 4)
    start = heard[-1] + 1
lite.save(path, content(-1))
print(between, len(os.listdir(folder)))
"""


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", ["a.ckpt", "a"])
def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, name: str, how: str) -> None:
    """SIGKILL while one checkpoint after the other is overwritten; every leftover is gone after the next save."""
    done = run_python("-c", SCRIPT, str(tmp_path / name), how)
    assert done.returncode == 0, done.stderr
    between, left = map(int, done.stdout.split())
    assert between > 0, "no kill came in the middle of a save, so nothing was tested"
    assert left == (1 if "." in name else 4)
