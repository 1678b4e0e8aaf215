"""Ranks that train apart for some steps: the papers' numbers, and runs that go on where they were."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lite import CheckpointError, ConfigError, Lite, LocalSGDStrategy, UsageError, memory_estimate
from lite.checkpoint import manifest
from lite.precision.mixed import MixedPrecision
from lite.trainer import LightningModule, Trainer
from tests.support.models import MLP, regression
from tests.support.processes import run_distributed


def assert_near(a: Any, b: Any) -> None:
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def tolists(model: nn.Module) -> list[Any]:
    return [t.detach().tolist() for t in model.state_dict().values()]


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x = batch(rank, step)
    return (model(x) - x[:, :3]).pow(2).mean()


def build(strategy: Any, seed: int = 0) -> tuple[Lite, nn.Module, torch.optim.Optimizer, Any]:
    lite = Lite(accelerator="cpu", precision="64-true", strategy=strategy)
    torch.manual_seed(seed + lite.global_rank)  # rank 0's weights count
    model = nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), MLP(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
    lite.setup(model, optimizer, scheduler)
    return lite, model, optimizer, scheduler


def train(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, start: int, end: int) -> Any:
    for step in range(start, end):
        optimizer.zero_grad()
        lite.backward(loss_of(model, lite.global_rank, step))
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
    return tolists(model)


def every_step(strategy: Any, momentum: float) -> Any:
    lite = Lite(accelerator="cpu", precision="64-true", strategy=strategy)
    torch.manual_seed(0)
    loader = lite.setup_dataloaders(DataLoader(regression(13, torch.float64), batch_size=3))
    model = MLP(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)
    lite.setup(model, optimizer)
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            lite.backward((model(x) - y).pow(2).mean())
            optimizer.step()
    lite.check_sync()
    lite.teardown()
    assert type(optimizer) is torch.optim.SGD
    return tolists(model)


def test_averaging_after_every_step_is_ddp() -> None:
    """SGD, also with momentum: the mean of the steps is the step by the mean gradient; ragged batches included."""
    for momentum in (0.0, 0.9):
        local, ddp = (
            run_distributed(every_step, strategy, momentum) for strategy in (LocalSGDStrategy(sync_every=1), "ddp")
        )
        for mine in local:
            for a, b in zip(mine, ddp[0], strict=True):
                assert_near(a, b)


def run_whole(strategy: Any, steps: int) -> Any:
    return train(*build(strategy), 0, steps)


def by_the_papers(sync_every: int, steps: int, outer: bool) -> list[list[Any]]:
    """Two workers in one process, written out from the papers' algorithms."""
    return workers_of_the_papers(range(sync_every, steps + 1, sync_every), steps, outer)


def by_the_papers_with_ends(ends: Sequence[int], outer: bool) -> list[Any]:
    """The weights after the last of these syncs."""
    return workers_of_the_papers(ends, ends[-1], outer)[0]


def workers_of_the_papers(syncs: Sequence[int], steps: int, outer: bool) -> list[list[Any]]:
    torch.manual_seed(0)
    workers = [nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), MLP(torch.float64)) for _ in range(2)]
    workers[1].load_state_dict(workers[0].state_dict())
    inner = [torch.optim.AdamW(worker.parameters(), lr=0.05) for worker in workers]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 2, gamma=0.9) for one in inner]
    theta = [p.detach().clone() for p in workers[0].parameters()]
    velocity = [torch.zeros_like(p) for p in theta]
    for step in range(steps):
        for rank, (worker, optimizer, scheduler) in enumerate(zip(workers, inner, schedulers, strict=True)):
            optimizer.zero_grad()
            loss_of(worker, rank, step).backward()
            nn.utils.clip_grad_norm_(worker.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        if step + 1 not in syncs:
            continue
        with torch.no_grad():
            for i, (a, b) in enumerate(zip(*(worker.parameters() for worker in workers), strict=True)):
                if outer:  # Nesterov's momentum of 0.9, outer learning rate 0.7
                    delta = ((theta[i] - a) + (theta[i] - b)) / 2
                    velocity[i] = 0.9 * velocity[i] + delta
                    theta[i] = theta[i] - 0.7 * (delta + 0.9 * velocity[i])
                else:
                    theta[i] = (a + b) / 2
                a.copy_(theta[i])
                b.copy_(theta[i])
            for a, b in zip(*(worker.buffers() for worker in workers), strict=True):
                if a.is_floating_point():
                    mean = (a + b) / 2
                    a.copy_(mean)
                    b.copy_(mean)
    return [tolists(worker) for worker in workers]


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_numbers_are_the_papers(outer: str | None) -> None:
    """Three rounds of three steps and two steps apart, AdamW inside, float64 to 1e-12."""
    results = run_distributed(run_whole, LocalSGDStrategy(sync_every=3, outer_optimizer=outer), 11)
    for mine, wanted in zip(results, by_the_papers(3, 11, outer is not None), strict=True):
        for a, b in zip(mine, wanted, strict=True):
            assert_near(a, b)
    assert results[0] != results[1]
    together = run_distributed(run_whole, LocalSGDStrategy(sync_every=3, outer_optimizer=outer), 9)
    assert together[0] == together[1]


NAMES = ("model", "optimizer", "scheduler")


def make(outer: str | None) -> LocalSGDStrategy:
    return LocalSGDStrategy(sync_every=3, outer_optimizer=outer)


def interrupted(folder: str, outer: str | None) -> Any:
    first = build(make(outer))
    train(*first, 0, 4)
    in_sync = first[0].strategy.in_sync
    for path in ("one.ckpt", "parts", "async"):
        first[0].save(f"{folder}/{path}", dict(zip(NAMES, first[1:], strict=True)), async_save=path == "async")
    first[0].wait_for_save()
    expected = train(*first, 4, 8)
    answers = [in_sync, expected == train(*build(make(outer)), 0, 8)]
    for path in ("one.ckpt", "parts", "async"):
        again = build(make(outer), seed=5)
        again[0].load(f"{folder}/{path}", dict(zip(NAMES, again[1:], strict=True)))
        answers.append(train(*again, 4, 8) == expected)
    ddp = build("ddp", seed=6)
    ddp[0].load(f"{folder}/parts", dict(zip(NAMES, ddp[1:], strict=True)))
    ddp[0].check_sync(buffers=True)
    return [answers, tolists(ddp[1])]


def elsewhere(path: str, outer: str | None) -> Any:
    lite, model, optimizer, scheduler = build(make(outer))
    lite.load(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
    return [tolists(model), lite.strategy.in_sync]


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_an_interrupted_run_equals_an_uninterrupted_one(outer: str | None, tmp_path: Path) -> None:
    """Saved in the middle of a round, in every form; saving changes nothing; others load what the ranks agree on."""
    results = run_distributed(interrupted, str(tmp_path), outer)
    workers = by_the_papers(3, 4, outer is not None)
    # Between syncs: where the outer optimizer would start from, or the mean without one; buffers' means.
    agreed = by_the_papers(3, 3, True)[0] if outer else None
    for answers, model in results:
        assert answers == [False, True, True, True, True]
        for i, values in enumerate(model):
            pair = torch.tensor([workers[0][i], workers[1][i]], dtype=torch.float64)
            is_buffer = i in (2, 3, 4)  # of the BatchNorm
            assert_near(values, agreed[i] if agreed and not is_buffer else pair.mean(0).tolist())
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["model"]
    for path in ("one.ckpt", "parts"):
        for model, in_sync in run_distributed(elsewhere, str(tmp_path / path), outer, world_size=3):
            assert in_sync
            assert model == [t.tolist() for t in stored.values()]


def averaging(outer: str | None) -> Any:
    lite, model, optimizer, scheduler = build(LocalSGDStrategy(sync_every=2, outer_optimizer=outer))
    ema = lite.ema(model, decay=0.5)
    ema.update()  # nobody has trained yet
    refused = []
    for step in range(3):
        train(lite, model, optimizer, scheduler, step, step + 1)
        if lite.strategy.in_sync:
            ema.update()
            continue
        for call in (ema.update, lambda: lite.ema(model)):
            with pytest.raises(UsageError) as told:
                call()
            refused.append(str(told.value))
    with ema.swap():
        averaged = [p.tolist() for p in model.parameters()]
    lite.strategy.end_period()
    ema.update()
    return averaged, [t.tolist() for t in ema.state_dict()["averages"].values()], ema.num_updates, refused


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_an_average_of_weights_takes_in_those_that_all_ranks_have(outer: str | None) -> None:
    """Between two syncs it is refused, with the way out; so all ranks keep the same one."""
    first, second = run_distributed(averaging, outer)
    assert first == second
    assert first[2] == 3
    updates = [text for text in first[3] if text.startswith("ema.update()")]
    made = [text for text in first[3] if text.startswith("lite.ema()")]
    assert len(updates) == len(made) == 2
    assert all(
        "if lite.strategy.is_in_sync(model)" in text and "lite.strategy.end_period()" in text for text in first[3]
    )


def within_swap(folder: str, outer: str | None) -> Any:
    lite, model, optimizer, scheduler = build(LocalSGDStrategy(sync_every=3, outer_optimizer=outer))
    ema = lite.ema(model, decay=0.5)
    train(lite, model, optimizer, scheduler, 0, 3)
    ema.update()
    answers: list[Any] = []
    for until in (4, 5):  # in a period, and with its last step due
        train(lite, model, optimizer, scheduler, until - 1, until)
        before = tolists(model)
        with ema.swap():
            inside = tolists(model)
            for call in (lite.strategy.end_period, optimizer.step, lite.teardown):
                with pytest.raises(UsageError, match=r"within ema\.swap\(\)"):
                    call()
            answers.append(tolists(model) == inside and not lite.strategy.in_sync)
            for path in ("one.ckpt", "parts"):
                lite.save(f"{folder}/{path}", {"model": model, "optimizer": optimizer})
            answers.append(tolists(model) == inside)
        answers.append(tolists(model) == before)
    lite.strategy.end_period()
    ended = tolists(model)
    with ema.swap():
        lite.strategy.end_period()  # nothing to do
        averages = [p.tolist() for p in model.parameters()]
    for path in ("one.ckpt", "parts"):
        lite.load(f"{folder}/{path}", {"model": model, "optimizer": optimizer})
        answers.append([p.tolist() for p in model.parameters()] == averages)
    return answers, ended, averages


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_averages_in_the_place_of_weights_are_saved_and_not_trained(outer: str | None, tmp_path: Path) -> None:
    """Within swap no period ends, and no step is taken; a checkpoint has the averages as the model."""
    first, second = run_distributed(within_swap, str(tmp_path), outer)
    assert first == second
    assert first[0] == [True] * 8
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["model"]
    names = [name for name, _ in build("single")[1].named_parameters()]
    assert [stored[name].tolist() for name in names] == first[2]


def skipping() -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    strategy = LocalSGDStrategy(sync_every=2)
    lite = Lite(accelerator="cpu", strategy=strategy, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    lite.setup(model, optimizer)
    ema = lite.ema(model, decay=0.5)
    skipped = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.full((2, 4), 1.0 + lite.global_rank)).pow(2).mean()
        lite.backward(loss * float("inf") if step == 1 and lite.global_rank == 1 else loss)
        optimizer.step()
        skipped.append(lite.step_was_skipped(optimizer))
        if lite.strategy.in_sync:
            ema.update()
    with pytest.raises(UsageError, match=r"lite.join is for DDP"):
        lite.join(model)
    with pytest.raises(ConfigError, match="LBFGS"):
        lite.setup(other := nn.Linear(2, 2), torch.optim.LBFGS(other.parameters()))
    averages = [t.tolist() for t in ema.state_dict()["averages"].values()]
    return [tolists(model), averages, ema.num_updates], skipped, lite.explain()


def test_a_step_that_one_rank_leaves_out_counts() -> None:
    """An inf on one rank: rounds stay in step, and averages of the weights are the same."""
    (first, skipped, text), (second, others, _) = run_distributed(skipping)
    assert first == second
    assert first[-1] == 2
    assert (skipped, others) == ([False] * 4, [False, True, False, False])
    assert "2 ranks train apart, and parameters are averaged every 2 steps" in text


def test_one_process_alone() -> None:
    """Nothing is done without an outer optimizer; with one it steps on this rank's own change."""
    raw = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    Lite(accelerator="cpu", strategy="local_sgd").setup(raw, optimizer)
    assert type(optimizer) is torch.optim.SGD
    half = LocalSGDStrategy(sync_every=2, outer_optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    lite = Lite(accelerator="cpu", strategy=half)
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    inner = torch.optim.SGD(model.parameters(), lr=0.25)
    lite.setup(model, inner)
    for _ in range(2):
        inner.zero_grad()
        lite.backward(model(torch.ones(1, 1)).sum())
        inner.step()
    # 1 - 2 * 0.25 = 0.5, and half the way there: 0.75
    assert model.weight.item() == 0.75


def test_wrong_arguments_are_refused() -> None:
    """With what was expected."""
    for arguments, words in (
        ({"sync_every": 0}, "sync_every=0"),
        ({"sync_every": True}, "sync_every=True"),
        ({"outer_optimizer": "nesterov"}, "'diloco'"),
        ({"outer_optimizer": torch.optim.SGD}, "a function"),
    ):
        with pytest.raises(ConfigError, match=words):
            LocalSGDStrategy(**arguments)  # type: ignore[arg-type]
    sgd = partial(torch.optim.SGD, lr=1.0)
    for outer, words in (
        (lambda params: params, "must return a torch optimizer"),
        (lambda params: sgd([p for p in params if p.ndim > 1]), "leaves out 1 of the 2 parameters"),
        (lambda params: sgd([torch.zeros(1, requires_grad=True)]), r"out 2 .* and holds others \(1\),"),
        (lambda params: torch.optim.LBFGS(params), "LBFGS, whose step.* a closure"),
    ):
        strategy = LocalSGDStrategy(outer_optimizer=outer)
        model = nn.Linear(1, 1)
        for precision in ("32-true", "16-mixed"):  # which goes around steps, too
            inner = sgd(model.parameters())
            lite = Lite(accelerator="cpu", strategy=strategy, precision=precision)
            for _ in range(2):  # it is given back, and can be set up again
                with pytest.raises(ConfigError, match=f"outer_optimizer returned .*{words}"):
                    lite.setup(model, inner)
            assert (type(model), type(inner)) == (nn.Linear, torch.optim.SGD)
            assert not inner._optimizer_step_pre_hooks
            assert "Linear" not in lite.explain()
            with pytest.raises(UsageError, match="has not prepared"):
                lite.no_backward_sync(model)
        with pytest.raises(ConfigError, match=words):
            memory_estimate(model, strategy, optimizer=sgd)


# ---- what is asked for is loaded, and nothing else


def loading_parts(folder: str, outer: str | None) -> None:
    lite, *objects = build(make(outer))
    saved = dict(zip(NAMES, objects, strict=True))
    train(lite, *objects, 0, 4)
    lite.save(f"{folder}/all.ckpt", saved)
    lite.save(f"{folder}/model.ckpt", {"model": objects[0]})
    lite.save(f"{folder}/part.ckpt", saved, {"model": lambda key, value: key.startswith("0.")})
    if lite.is_global_zero:
        for name in ("model", "part"):
            assert "strategy" not in torch.load(f"{folder}/{name}.ckpt", weights_only=True)[manifest.KEY]
        torch.save(torch.load(f"{folder}/all.ckpt", weights_only=True)["model"], f"{folder}/raw.pt")
    lite.barrier()
    stored = [t.tolist() for t in torch.load(f"{folder}/raw.pt", weights_only=True).values()]

    for steps in (0, 2):  # a model alone, fresh and in the middle of a period
        lite, model, optimizer, scheduler = build(make(outer), seed=5)
        train(lite, model, optimizer, scheduler, 0, steps)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        for path in ("all.ckpt", "model.ckpt", "raw.pt"):
            if path == "raw.pt":
                lite.load_raw(f"{folder}/{path}", model)
            else:
                lite.load(f"{folder}/{path}", {"model": model})
            assert tolists(model) == stored
            assert lite.strategy.in_sync
            assert str(optimizer.state_dict()["state"]) == str(before)
            train(lite, model, optimizer, scheduler, 0, steps)
            before = copy.deepcopy(optimizer.state_dict()["state"])

    lite, model, optimizer, scheduler = build(make(outer), seed=5)  # an optimizer alone
    train(lite, model, optimizer, scheduler, 0, 1)
    before = tolists(model)
    lite.load(f"{folder}/all.ckpt", {"optimizer": optimizer})
    assert tolists(model) == before
    assert not lite.strategy.in_sync
    assert optimizer.state[next(iter(optimizer.state))]["step"] == 4
    with pytest.warns(UserWarning, match="optimizer"):  # and a model without its optimizer's entry
        lite.load(f"{folder}/model.ckpt", {"model": model, "optimizer": optimizer}, strict=False)
    assert tolists(model) == stored
    assert lite.strategy.in_sync

    teacher = lite.setup(copy.deepcopy(model))  # another model than the one that trains
    train(lite, model, optimizer, scheduler, 0, 1)
    before = [tolists(model), str(optimizer.state_dict()["state"])]
    lite.load(f"{folder}/all.ckpt", {"model": teacher})
    lite.load(f"{folder}/all.ckpt", {"model": teacher, "optimizer": optimizer})
    assert tolists(teacher) == stored
    assert tolists(model) == before[0]
    assert not lite.strategy.in_sync

    torch.manual_seed(8 + lite.global_rank)  # a model with more than there is in the checkpoint
    wider = nn.Sequential(*copy.deepcopy(model), nn.Linear(3, 3, dtype=torch.float64))
    inner = torch.optim.AdamW(wider.parameters(), lr=0.05)
    lite.setup(wider, inner)
    lite.backward(wider(batch(lite.global_rank, 0)).sum())
    inner.step()
    with pytest.warns(UserWarning, match=r"model.2.weight"):
        lite.load(f"{folder}/all.ckpt", {"model": wider}, strict=False)
    first, second = lite.all_gather(wider[2].weight)
    assert torch.equal(first, second)
    assert tolists(wider)[: len(stored)] == stored


def two_models(folder: str, outer: str | None) -> None:
    """One of them goes on in the middle of its period, and the other one stays where it is."""
    lite, *first = build(make(outer))
    second = nn.Linear(4, 3, dtype=torch.float64)
    inner = torch.optim.AdamW(second.parameters(), lr=0.05)
    lite.setup(second, inner)
    train(lite, *first, 0, 4)
    lite.save(f"{folder}/two", {"a": first[0], "oa": first[1], "b": second, "ob": inner})
    here, weights = tolists(first[0]), tolists(second)
    for step in range(2):
        lite.backward(loss_of(second, lite.global_rank, step))
        inner.step()
    train(lite, *first, 4, 5)
    other = tolists(second)
    assert other != weights
    lite.load(f"{folder}/two", {"a": first[0], "oa": first[1]})
    assert tolists(first[0]) == here
    assert tolists(second) == other
    assert [part.count for part in lite.strategy._rounds] == [1, 2]
    lite.load(f"{folder}/two", {"b": second, "ob": inner})
    assert tolists(second) == weights
    assert [part.count for part in lite.strategy._rounds] == [1, 0]


def begun_from(folder: str, way: str) -> Any:
    """A period whose first weights were loaded after setup, by lite or past it."""
    lite, model, optimizer, scheduler = build(make("diloco"), seed=0 if way == "setup" else 5)
    if way == "setup":
        lite.save(f"{folder}/first.ckpt", {"model": model})
    elif way == "lite":
        lite.load(f"{folder}/first.ckpt", {"model": model})
    else:
        model.load_state_dict(torch.load(f"{folder}/first.ckpt", weights_only=True)["model"])
    return train(lite, model, optimizer, scheduler, 0, 3)


def another_outer_optimizer(folder: str) -> str:
    lite, model, optimizer, _ = build(LocalSGDStrategy(outer_optimizer=lambda params: torch.optim.AdamW(params)))
    before = tolists(model)
    with pytest.raises(CheckpointError) as caught:
        lite.load(f"{folder}/all.ckpt", {"model": model, "optimizer": optimizer})
    assert tolists(model) == before
    assert not optimizer.state
    return str(caught.value)


def loading_laws(folder: str) -> str:
    for outer in (None, "diloco"):
        loading_parts(folder, outer)
        two_models(folder, outer)
    begun = [begun_from(folder, way) for way in ("setup", "lite", "past it")]
    assert begun[0] == begun[1] == begun[2]
    return another_outer_optimizer(folder)


def test_only_what_is_asked_for_is_loaded(tmp_path: Path) -> None:
    """A model or an optimizer alone, one of several models, with missing keys, past lite: a model begins a new period,
    with equal weights on all ranks, and what was not asked for stays; what does not fit is refused before."""
    for told in run_distributed(loading_laws, str(tmp_path)):
        assert "'outer optimizer of optimizer' does not fit AdamW" in told


# ---- the end of a period before its last step


def ending(outer: str | None) -> Any:
    lite, *objects = build(make(outer))
    train(lite, *objects, 0, 4)
    apart = tolists(objects[0])
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            lite.teardown()
    failed = tolists(objects[0]) == apart
    lite, *objects = build(make(outer))
    train(lite, *objects, 0, 3)
    lite.strategy.end_period()  # they are together
    train(lite, *objects, 3, 4)
    lite.teardown()
    return [failed, tolists(objects[0])]


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_teardown_ends_a_period(outer: str | None) -> None:
    """No rank's last steps are lost; where an error is handled, nobody waits for ranks that may have none."""
    shorter = by_the_papers_with_ends((3, 4), outer is not None)
    for failed, model in run_distributed(ending, outer):
        assert failed
        for a, b in zip(model, shorter, strict=True):
            assert_near(a, b)


class Watched(LightningModule):
    """Notes its weights wherever ranks must have the same ones."""

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 3)
        self.path = path
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).pow(2).mean()

    def on_train_start(self) -> None:
        self.began = [self.trainer.strategy.in_sync, tolists(self), len(self.optimizers().state)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.path and self.global_step == 5:
            assert not self.trainer.strategy.in_sync
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.layer(batch[0]) - batch[1]).pow(2).mean(), sync_dist=True)

    def on_validation_start(self) -> None:
        self.seen.append(tolists(self))

    def on_train_end(self) -> None:
        self.seen.append(tolists(self))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def with_trainer(folder: str, outer: str | None) -> Any:
    def fit(path: str | None = None, **options: Any) -> Watched:
        module = Watched(path)
        trainer = Trainer(
            accelerator="cpu",
            strategy=make(outer),
            max_steps=8,
            val_check_interval=4,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = [DataLoader(regression(n), batch_size=1) for n in (16, 4)]
        trainer.fit(module, *loaders, **options)
        return module

    whole = fit(f"{folder}/five.ckpt")
    resumed = fit(ckpt_path=f"{folder}/five.ckpt")
    weights = fit(ckpt_path=f"{folder}/five.ckpt", restore=("model",))
    assert tolists(resumed) == tolists(whole)
    return [whole.seen, tolists(whole), weights.began, torch.load(f"{folder}/five.ckpt")["state_dict"]["layer.weight"]]


@pytest.mark.parametrize("outer", [None, "diloco"])
def test_the_trainer_evaluates_and_ends_with_equal_weights(outer: str | None, tmp_path: Path) -> None:
    """In the middle of a period too; a run resumed there equals the uninterrupted one, and weights alone begin anew."""
    first, second = run_distributed(with_trainer, str(tmp_path), outer)
    assert first[:3] == second[:3]
    seen, ended, (in_sync, begun, states), stored = first
    assert len(seen) == 4
    assert len({str(weights) for weights in seen}) == 3  # sanity, step 4, step 8 and the end
    assert seen[-1] == ended
    assert in_sync
    assert states == 0
    assert begun[0] == stored.tolist()


def two_paces() -> list[tuple[bool, bool, bool]]:
    lite = Lite(accelerator="cpu", strategy=LocalSGDStrategy(sync_every=2))
    pairs = [lite.setup(m := nn.Linear(2, 1), torch.optim.SGD(m.parameters(), lr=0.1)) for _ in range(2)]
    averages = [lite.ema(model, decay=0.9) for model, _ in pairs]
    seen = []
    for number in range(4):
        for model, optimizer in pairs[: 1 + (number % 3 == 0)]:
            optimizer.zero_grad()
            lite.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
        seen.append((lite.strategy.in_sync, *(lite.strategy.is_in_sync(model) for model, _ in pairs)))
        for average, (model, _) in zip(averages, pairs, strict=True):
            if lite.strategy.is_in_sync(model):
                average.update()
    return seen


def test_models_at_their_own_paces_are_asked_one_by_one() -> None:
    """Whether all ranks have a model's weights is that model's own."""
    expected = [(False, False, False), (False, True, False), (False, False, False), (True, True, True)]
    assert run_distributed(two_paces) == [expected] * 2
