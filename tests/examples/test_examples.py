"""Each example runs as its users run it, gives the raw script's numbers, and does what it says."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.run_scripts import SEPARATOR
from tests.support.processes import ROOT, kill_tree, run_python, run_torchrun, start_torchrun

EXAMPLES = ROOT / "examples"
RUN_SCRIPTS = Path(__file__).with_name("run_scripts.py")
# Two ranks can't share one GPU, and GPU kernels need not be deterministic.
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
QUICK = {"digits": "2", "char_lm": "1", "gan": "3", "reinforce": "20"}  # epochs
WITH_TRAINER = ["digits", "char_lm", "gan"]
BATCH_SIZE = 32
FEWER = {"NUM_BLOCKS": "902"}  # of char_lm's text, where a CPU is slow
NUM_TRAIN = {"digits": 1437, "char_lm": 811, "gan": 1437}


def run_here(*commands: list[str], **variables: str) -> list[str]:
    """Run examples in one process; return what each one printed."""
    full = [[str(EXAMPLES / script), *arguments] for script, *arguments in commands]
    done = run_python(str(RUN_SCRIPTS), json.dumps(full), env={**ON_CPU, **variables})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split(f"{SEPARATOR}\n")[1:]


def run_on_two(script: str, *arguments: str, stderr: str = "", **variables: str) -> str:
    """Run an example under torchrun with two processes; return what it printed."""
    command = [str(EXAMPLES / script), *arguments]
    if variables:
        command = [str(RUN_SCRIPTS), json.dumps([command])]
    done = run_torchrun(*command, env={**ON_CPU, **variables})
    assert (done.returncode, done.stderr[: len(stderr) or None]) == (0, stderr)
    return done.stdout.removeprefix(f"{SEPARATOR}\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


class Pair:
    """What the raw script and the Lite script of one task printed and recorded on one process."""

    def __init__(self, task: str, precision: str, folder: Path) -> None:
        options = ["--epochs", QUICK[task], "--precision", precision, "--losses"]
        commands = [[f"{task}_{kind}.py", *options, str(folder / kind)] for kind in ("raw", "lite")]
        fewer = FEWER if precision == "bf16-mixed" else {}
        self.raw_text, self.lite_text = run_here(*commands, **fewer)
        self.raw_record, self.lite_record = read(folder / "raw"), read(folder / "lite")


@pytest.fixture(scope="module")
def on_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """Runs a task once, however many tests look at it."""
    return cache(lambda task, precision: Pair(task, precision, tmp_path_factory.mktemp(task)))


@pytest.mark.parametrize(
    ("task", "precision"),
    [
        ("digits", "32-true"),
        ("char_lm", "32-true"),
        ("char_lm", "bf16-mixed"),
        ("gan", "32-true"),
        ("reinforce", "32-true"),
    ],
)
def test_one_process_equals_raw_bit_for_bit(
    task: str, precision: str, on_one_process: Callable[[str, str], Pair]
) -> None:
    """Losses of all steps, final weights and printed text are the raw script's."""
    pair = on_one_process(task, precision)
    assert pair.lite_record == pair.raw_record
    assert pair.lite_text == pair.raw_text != ""


@pytest.mark.parametrize("task", WITH_TRAINER)
def test_the_trainer_equals_raw_bit_for_bit(
    task: str, on_one_process: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    """Losses of all steps, final weights and printed text of the same task with the Trainer."""
    options = ["--epochs", QUICK[task], "--precision", "32-true", "--losses"]
    (text,) = run_here([f"{task}_trainer.py", *options, str(tmp_path / "trainer")])
    pair = on_one_process(task, "32-true")
    assert read(tmp_path / "trainer") == pair.raw_record
    assert text == pair.raw_text


@pytest.mark.parametrize(("task", "kind"), [*((t, "lite") for t in QUICK), *((t, "trainer") for t in WITH_TRAINER)])
def test_two_processes_equal_one_with_doubled_batch(task: str, kind: str, tmp_path: Path) -> None:
    """In float64 the losses, final weights and printed evaluation are those of raw with twice the batch size."""
    epochs = {**QUICK, "reinforce": "2"}[task]
    options = ["--epochs", epochs, "--precision", "64-true", "--losses"]
    fewer = FEWER if task == "char_lm" else {}
    command = [f"{task}_raw.py", "--batch-size", str(2 * BATCH_SIZE), *options, str(tmp_path / "raw")]
    (raw,) = run_here(command, **fewer)
    lite = run_on_two(f"{task}_{kind}.py", "--batch-size", str(BATCH_SIZE), *options, str(tmp_path / "lite"), **fewer)

    expected, first, second = read(tmp_path / "raw"), read(tmp_path / "lite"), read(tmp_path / "lite.1")
    assert first["sha256"] == second["sha256"]
    assert first["losses"] != second["losses"], "each rank should have data of its own"
    tolerance = 1e-12  # sums are added up in another order: a few units of 2e-16 in each step
    for name, values in expected["weights"].items():
        assert first["weights"][name] == pytest.approx(values, rel=0, abs=tolerance), name
    shares = [(1, 1)] * len(expected["losses"])  # reinforce's losses are parts of one mean
    if task in NUM_TRAIN:
        each = 2 if task == "gan" else 1  # a loss for each of its models
        num_steps = int(epochs) * -(-NUM_TRAIN[task] // (2 * BATCH_SIZE))
        assert len(expected["losses"]) == each * num_steps
        shares = [num_samples(i // each, NUM_TRAIN[task]) for i in range(each * num_steps)]
        assert any(n != m for n, m in shares), "the last batch should be one that two ranks can't share evenly"
    losses = [
        (one * n + other * m) / (n + m)
        for one, other, (n, m) in zip(first["losses"], second["losses"], shares, strict=True)
    ]
    assert losses == pytest.approx(expected["losses"], rel=0, abs=tolerance)
    # The evaluation prints 2 or 3 decimals, from all samples once each; char_lm's sample depends on all weights. The
    # GAN prints rank 0's last loss, and an image.
    skipped = 1 if task == "gan" else 0
    assert lite.splitlines()[skipped:] == raw.splitlines()[skipped:] != []


def num_samples(step: int, num_train: int) -> tuple[int, int]:
    """How many samples each of two ranks has in a step."""
    start = step % -(-num_train // (2 * BATCH_SIZE)) * 2 * BATCH_SIZE
    both = min(2 * BATCH_SIZE, num_train - start)
    return both - both // 2, both // 2


def test_a_precision_comes_from_where_it_was_given(tmp_path: Path) -> None:
    """LITE_PRECISION counts where --precision is left out; a raw script names the precisions that it knows."""
    options = ["--epochs", "1", "--losses", str(tmp_path / "x")]
    done = run_python(str(EXAMPLES / "digits_lite.py"), *options, env={**ON_CPU, "LITE_PRECISION": "64-true"})
    assert done.returncode == 0, done.stderr
    assert any(loss != torch.tensor(loss).item() for loss in read(tmp_path / "x")["losses"]), "more than float32's bits"
    done = run_python(str(EXAMPLES / "gan_raw.py"), "--precision", "bf16-mixed", env=ON_CPU)
    assert (done.returncode, done.stderr) == (
        1,
        "--precision bf16-mixed: this raw script knows 32-true, 64-true alone\n",
    )


def test_digits_on_two_processes_get_over_95_percent_right() -> None:
    """The whole run, as the README starts it: over 95 % of the test set, each of its 360 images counted once."""
    lines = run_on_two("digits_lite.py").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"epoch {n}" for n in range(1, 13)]
    found = re.fullmatch(r"epoch 12: test accuracy (\d+\.\d\d)% \((\d+) of 360\)", lines[-1])
    assert found is not None, lines[-1]
    assert float(found[1]) > 95
    assert int(found[2]) > 0.95 * 360


def test_char_lm_learns_and_writes(on_one_process: Callable[[str, str], Pair]) -> None:
    """The loss on unseen text falls, and `generate` continues the prompt by as many characters as asked."""
    text = on_one_process("char_lm", "32-true").lite_text
    before, after = (float(loss) for loss in re.findall(r"test loss .*: (\d+\.\d+)", text))
    assert after < 0.6 * before
    assert len(text[text.index("The ") :].removesuffix("\n")) == len("The ") + 160


def test_reinforce_learns(on_one_process: Callable[[str, str], Pair]) -> None:
    """The pole stands longer and longer."""
    text = on_one_process("reinforce", "32-true").lite_text
    early, late = (float(steps) for steps in re.findall(r"stood for (\d+\.\d+)", text))
    assert late > early


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """resume_lite.py under torchrun, killed with all its processes after a few checkpoints and started again."""

    def options(name: str) -> list[str]:
        return ["--epochs", "1", "--every-steps", "5", "--folder", str(tmp_path / name), "--losses"]

    run_on_two("resume_lite.py", *options("whole"), str(tmp_path / "whole.json"))
    arguments = [str(EXAMPLES / "resume_lite.py"), *options("cut"), str(tmp_path / "cut.json")]
    started = start_torchrun(*arguments, env=ON_CPU)
    try:
        while not list((tmp_path / "cut").glob("step-*.ckpt")):
            assert started.poll() is None
            time.sleep(0.02)
    finally:
        kill_tree(started)
    text = run_on_two("resume_lite.py", *options("cut"), str(tmp_path / "cut.json"), stderr="resumed from")
    assert "step 45" in text
    assert read(tmp_path / "cut.json") == read(tmp_path / "whole.json")


def test_digits_takes_at_most_8_added_lines() -> None:
    """From raw to Lite; a changed line counts as one removed and one added."""
    raw, lite = ((EXAMPLES / name).read_text().splitlines() for name in ("digits_raw.py", "digits_lite.py"))
    added = [line for line in difflib.ndiff(raw, lite) if line.startswith("+ ")]
    assert 0 < len(added) <= 8, "\n".join(added)


def test_models_larger_than_a_device_train_as_they_do_on_one(tmp_path: Path) -> None:
    """fsdp_gpt.py and tensor_parallel.py print and record on two processes what they do on one, in float64."""
    options = ["--blocks", "640", "--epochs", "1", "--precision", "64-true", "--losses"]
    scripts = {"fsdp_gpt.py": BATCH_SIZE // 2, "tensor_parallel.py": BATCH_SIZE}  # of each process
    names = {script: str(tmp_path / script) for script in scripts}
    texts = run_here(*([script, *options, name] for script, name in names.items()))
    for (script, batch_size), text in zip(scripts.items(), texts, strict=True):
        path = tmp_path / f"{script}.two"
        assert run_on_two(script, *options, str(path), "--batch-size", str(batch_size)) == text != ""
        one, two = read(tmp_path / script), read(path)
        # Sums over ranks round otherwise, and AdamW divides by them.
        assert two["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-9)
        for name, values in one["weights"].items():
            assert two["weights"][name] == pytest.approx(values, rel=0, abs=1e-9), name
        assert one["losses"][-1] < 0.8 * one["losses"][0]
        assert read(Path(f"{path}.1"))["sha256"] == two["sha256"]
