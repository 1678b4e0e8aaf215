"""Behaviour 47: several optimizers in automatic optimisation by declaration, and the same in manual by helpers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite.errors import ConfigError
from lite.trainer import LightningModule
from lite.trainer.profilers import SimpleProfiler
from tests.support.processes import run_distributed
from tests.trainer.modules import Tiny, numbers, trainer, weights


class Pair(LightningModule):
    """A maker and a critic."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.maker, self.critic = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()

    def critic_loss(self, batch: Tensor) -> Tensor:
        return (self.critic(self.maker(batch).detach()) - self.critic(batch)).square().mean()

    def maker_loss(self, batch: Tensor) -> Tensor:
        made = self.maker(batch)
        return made.square().mean() - self.critic(made).mean()


class Declared(Pair):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.seen: list[str] = []

    def critic_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert not any(p.requires_grad for p in self.maker.parameters())
        loss = self.critic_loss(batch)
        self.log("critic", loss)
        return loss

    def maker_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.maker_loss(batch)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(" ".join(outputs))

    def configure_optimizers(self) -> Any:
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.1)
        maker = torch.optim.SGD(self.maker.parameters(), lr=0.1)
        schedule = {"scheduler": torch.optim.lr_scheduler.StepLR(critic, 2, 0.5), "interval": "step"}
        return [
            {"optimizer": critic, "step": self.critic_step, "lr_scheduler": schedule, "gradient_clip_val": 0.5},
            {"optimizer": maker, "step": "maker_step", "every_n_batches": 2, **self.settings},
        ]


class ByHand(Pair):
    """What `Declared(accumulate_grad_batches=2)` declares, by the helpers of manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        critic, maker = self.optimizers()
        with self.toggled_optimizer(critic):
            critic.zero_grad()
            self.manual_backward(self.critic_loss(batch))
            self.clip_gradients(critic, 0.5)
            critic.step()
            self.lr_schedulers().step()
        number = self.trainer.fit_loop.progress.batches + 1
        if number % 2 == 0:
            with self.toggled_optimizer(maker):
                window = self.accumulate(maker, steps=2)
                if not window.is_open:
                    maker.zero_grad()
                with window(last=self.trainer.num_training_batches - batch_idx <= 2):
                    self.manual_backward(self.maker_loss(batch))
                if window.ready:
                    maker.step()

    def configure_optimizers(self) -> Any:
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.1)
        schedulers = [torch.optim.lr_scheduler.StepLR(critic, 2, 0.5)]
        return [critic, torch.optim.SGD(self.maker.parameters(), lr=0.1)], schedulers


def raw(num_batches: int) -> tuple[list[float], int]:
    """Five batches per epoch: the maker in every second one, accumulated by two."""
    module, rows = Pair(), [batch for _ in range(2) for batch in numbers(20, 4)]
    critic = torch.optim.SGD(module.critic.parameters(), lr=0.1)
    maker = torch.optim.SGD(module.maker.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(critic, 2, 0.5)
    steps = waiting = 0
    for number, batch in enumerate(rows[:num_batches], start=1):
        critic.zero_grad()
        module.critic_loss(batch).backward()
        nn.utils.clip_grad_norm_(module.critic.parameters(), 0.5)
        critic.step()
        schedule.step()
        steps += 1
        if number % 2:
            continue
        if not waiting:
            maker.zero_grad()
        module.maker_loss(batch).div(2).backward()
        waiting += 1
        left = 5 - ((number - 1) % 5) - 1
        if waiting == 2 or left < 2:
            for parameter in module.maker.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(2 / waiting)
            maker.step()
            steps, waiting = steps + 1, 0
    return weights(module), steps


def run_pair(batch_size: int, by_hand: bool) -> tuple[list[float], int]:
    module = ByHand() if by_hand else Declared(accumulate_grad_batches=2)
    run = trainer(max_epochs=2, limit_val_batches=0, strategy="ddp")
    run.fit(module, numbers(20, batch_size))
    return weights(module), run.global_step


def pairs(batch_size: int) -> list[Any]:
    return [run_pair(batch_size, by_hand) for by_hand in (False, True)]


def test_behaviour_47_declared_optimizers_step_as_a_raw_loop_does(tmp_path: Path) -> None:
    """Each has its step function, its turn, its clipping, window and scheduler; a run goes on within a window."""
    expected, steps = raw(10)
    module = Declared(accumulate_grad_batches=2)
    run = trainer(max_epochs=2, limit_val_batches=0)
    for event in run.steps(module, numbers(20, 4), events=("batch",)):
        if event.batch_idx == 1 and event.epoch == 0:
            run.save_checkpoint(tmp_path / "open.ckpt")
    assert (weights(module), run.global_step) == (expected, steps)
    assert module.seen[:3] == ["critic_step", "critic_step maker_step", "critic_step"]
    assert run.callback_metrics.keys() == {"critic"}
    again = Declared(accumulate_grad_batches=2)
    trainer(max_epochs=2, limit_val_batches=0).fit(again, numbers(20, 4), ckpt_path=tmp_path / "open.ckpt")
    assert weights(again) == expected


def test_behaviour_47_helpers_do_the_same_by_hand_and_on_two_processes() -> None:
    """Clipping and accumulation in manual optimisation; two ranks are one with the doubled batch."""
    expected, steps = raw(10)
    assert pairs(4)[1] == (expected, steps)
    for rank in run_distributed(pairs, 2):
        for found, count in rank:
            assert found == pytest.approx(expected, rel=0, abs=1e-13)
            assert count == steps


def test_behaviour_47_wrong_declarations_are_refused() -> None:
    """With the key and what it takes."""
    for settings, said in (
        ({"every_n_batches": 0}, "every_n_batches=0 must be"),
        ({"accumulate_grad_batches": True}, "accumulate_grad_batches=True must be"),
        ({"step": "other"}, "must be a method of Declared"),
        ({"step": nn.ReLU().forward}, "must be a method of Declared"),
        ({"gradient_clip_algorithm": "nrm"}, "Did you mean 'norm'"),
    ):
        with pytest.raises(ConfigError, match=said):
            trainer().fit(Declared(**settings), numbers())

    class Half(Declared):
        def configure_optimizers(self) -> Any:
            first, second = super().configure_optimizers()
            del second["step"]
            return [first, second]

    with pytest.raises(ConfigError, match="without a 'step'"):
        trainer().fit(Half(), numbers())


class Looked(Declared):
    """Both step functions log, and so do the hooks between them."""

    def maker_step(self, batch: Tensor) -> dict[str, Tensor]:
        loss = self.maker_loss(batch)
        self.log("maker", loss)
        return {"loss": loss}

    def on_after_backward(self) -> None:
        self.log("backward", 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("step", 1.0)


def test_declared_steps_log_each_in_their_own_place_and_profilers_name_them() -> None:
    """Hooks of the first optimizer come before the second one's step function."""
    profiler = SimpleProfiler()
    run = trainer(limit_val_batches=0, profiler=profiler)
    run.fit(Looked(), numbers(20, 4))
    assert run.callback_metrics.keys() == {"critic", "maker", "backward", "step"}
    assert {"[Looked].critic_step", "[Looked].maker_step"} <= profiler.seconds.keys()


@pytest.mark.parametrize("accumulation", ["exact", "reference"])
def test_declared_windows_have_either_arithmetic(accumulation: str) -> None:
    """A partial window, or one with a ragged batch: by what is in it, or all divided by two."""
    for count in (10, 14):
        module = Declared(accumulate_grad_batches=2, every_n_batches=1)
        trainer(limit_val_batches=0, accumulation=accumulation).fit(module, numbers(count, 4))
        by, batches = Pair(), list(numbers(count, 4))
        critic, maker = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (by.critic, by.maker))
        schedule = torch.optim.lr_scheduler.StepLR(critic, 2, 0.5)
        for number, batch in enumerate(batches):
            critic.zero_grad()
            by.critic_loss(batch).backward()
            nn.utils.clip_grad_norm_(by.critic.parameters(), 0.5)
            critic.step()
            schedule.step()
            if number % 2 == 0:
                maker.zero_grad()
            window = batches[number // 2 * 2 :][:2]
            exact = len(batch) / sum(map(len, window))
            (by.maker_loss(batch) * (exact if accumulation == "exact" else 0.5)).backward()
            if number % 2 or number + 1 == len(batches):
                maker.step()
        assert weights(module) == pytest.approx(weights(by), rel=0, abs=1e-14)


def test_an_override_of_optimizer_step_may_leave_a_declared_step_function_out() -> None:
    """Its closure runs the step function, as with one optimizer; a step that it leaves out does not count."""

    class Leaves(Declared):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if optimizer.optimizer is self.trainer.optimizers[0]:
                optimizer.step(closure=optimizer_closure)

    module, run = Leaves(), trainer(limit_val_batches=0)
    before = [p.clone() for p in module.maker.parameters()]
    run.fit(module, numbers(16, 4))
    assert run.global_step == 4
    assert all(torch.equal(a, b) for a, b in zip(before, module.maker.parameters(), strict=True))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.1 / 4


@pytest.mark.parametrize("override", [False, True])
def test_declared_windows_of_a_loader_without_length_step_at_its_end(override: bool) -> None:
    """With clipping, hooks, counts and rates as where the length is known."""

    class Overridden(Looked):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    class Stream:
        def __iter__(self) -> Any:
            return iter(numbers(20, 4))

    found = []
    for loader in (numbers(20, 4), Stream()):
        kind = Overridden if override else Looked
        module = kind(accumulate_grad_batches=2, every_n_batches=1, gradient_clip_val=0.1)
        run = trainer(limit_val_batches=0, max_epochs=2)
        run.fit(module, loader)
        found.append((run.global_step, run.fit_loop.progress.stepped, run.callback_metrics.keys(), weights(module)))
    assert found[0][:3] == found[1][:3]
    assert found[0][3] == pytest.approx(found[1][3], rel=0, abs=1e-14)


class Bare:
    """A scheduler that doesn't name its optimizer."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.steps = state_dict["steps"]


def test_a_scheduler_that_names_no_optimizer_follows_the_one_beside_it() -> None:
    """Also where several optimizers step at paces of their own."""

    class Two(Tiny):
        def half(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            self.bare = [Bare(), Bare()]
            return [
                {
                    "optimizer": torch.optim.SGD(part.parameters(), lr=0.1),
                    "step": self.half,
                    "every_n_batches": every,
                    "lr_scheduler": {"scheduler": bare, "interval": "step"},
                }
                for part, every, bare in zip((self.net[0], self.net[3]), (1, 2), self.bare, strict=True)
            ]

    module = Two()
    trainer(limit_val_batches=0).fit(module, numbers(16))
    assert [bare.steps for bare in module.bare] == [4, 2]
