"""Behaviour 47: several optimizers in automatic optimisation by declaration, and the same in manual by helpers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite.errors import ConfigError
from lite.trainer import LightningModule
from tests.support.processes import run_distributed
from tests.trainer.modules import numbers, trainer, weights


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
