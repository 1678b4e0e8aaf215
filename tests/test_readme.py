"""Users copy from the README: each of its Python blocks runs, and its commands are what CI runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run_python, run_torchrun

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
DIGITS = [block for block in BLOCKS if "load_digits" in block]
OTHERS = [block for block in BLOCKS if block not in DIGITS]


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_every_block_runs(number: int, tmp_path: Path) -> None:
    """As a script of its own, on one process."""
    script = tmp_path / "block.py"
    script.write_text(OTHERS[number])
    done = run_python(str(script))
    assert done.returncode == 0, done.stderr


def test_the_digits_are_the_same_raw_with_lite_and_with_the_trainer(tmp_path: Path) -> None:
    """The three scripts, each of its own, print the same loss and the same share of right answers."""
    scripts = [tmp_path / f"{number}.py" for number in range(len(DIGITS))]
    for path, block in zip(scripts, DIGITS, strict=True):
        path.write_text(block)
    script = tmp_path / "all.py"
    script.write_text("import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path, run_name='__main__')\n")
    done = run_python(str(script), *map(str, scripts))
    assert done.returncode == 0, done.stderr
    first, second, third = (line for line in done.stdout.splitlines() if line.endswith("right"))
    assert first == second == third


def test_all_blocks_run_on_two_processes(tmp_path: Path) -> None:
    """One script of all blocks that don't start processes themselves, under torchrun."""
    script = tmp_path / "blocks.py"
    parts = [block for block in BLOCKS if "launch(" not in block]
    script.write_text("\n".join(parts).replace("tempfile.mkdtemp()", f"{str(tmp_path)!r}"))
    done = run_torchrun(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1:") == 1


def test_ci_runs_the_readmes_test_command(tmp_path: Path) -> None:
    """.ci/run takes its command from the README: here from one that says something else."""
    command = re.search(r"<!-- test command -->\n```bash\n(.*?)```", README, flags=re.S)
    assert command is not None
    assert "-m pytest" in command[1]
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "README.md").write_text(README.replace(command[1], "echo the command\nfalse\necho never\n"))
    done = subprocess.run([tmp_path / ".ci" / "run"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "the command\n")
    (tmp_path / "README.md").write_text(README.replace("<!-- test command -->", ""))
    assert subprocess.run([tmp_path / ".ci" / "run"], capture_output=True).returncode == 1
