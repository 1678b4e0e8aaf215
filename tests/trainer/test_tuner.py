"""Finding a learning rate and a batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lite.errors import ConfigError
from lite.trainer import LightningDataModule
from lite.trainer.tuner import Tuner
from tests.trainer.modules import Tiny, numbers, trainer, weights


class Sized(Tiny):
    """Fails as a device without memory does."""

    def __init__(self, most: int = 100, batch_size: int = 4) -> None:
        super().__init__()
        self.most, self.batch_size = most, batch_size
        self.seen: list[int] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append(len(batch))
        if len(batch) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return numbers(90, self.batch_size)


def test_a_learning_rate_is_found_and_put_where_it_is_used() -> None:
    """Between rates that do nothing and those that do harm; weights and random numbers stay as they were."""
    module = Tiny(lr=0.123)
    before = weights(module)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    run = trainer(auto_lr_find=True, limit_val_batches=0)
    found = run.tune(module, numbers(24, 24, shuffle=True), lr_find_kwargs={"max_lr": 100.0, "num_training": 60})[
        "lr_find"
    ]
    assert weights(module) == before and torch.equal(torch.rand(3), expected)
    rates = found.results["lr"]
    assert rates[0] == 1e-8 and rates == sorted(rates) and len(rates) == len(found.results["loss"]) <= 60
    assert module.hparams.lr == found.suggestion() and 1e-4 < module.hparams.lr < 100.0
    run.fit(module, numbers(24))
    assert run.optimizers[0].param_groups[0]["lr"] == found.suggestion()
    assert run.global_step == 6


def test_a_batch_size_is_found_by_trying() -> None:
    """Doubling, then halving; it ends at what fails, or at the dataset's size."""
    for options, expected in (
        ({"most": 21}, {"power": 16, "binsearch": 21}),
        ({"most": 1000}, {"power": 90, "binsearch": 90}),
        ({"most": 1}, {"power": 1, "binsearch": 1}),
    ):
        for mode, size in expected.items():
            module = Sized(**options)
            before = weights(module)
            assert trainer(auto_scale_batch_size=mode).tune(module) == {"scale_batch_size": size}
            assert module.batch_size == size and weights(module) == before
            assert max(module.seen) <= 90


def test_what_can_not_be_tuned_is_refused_by_name() -> None:
    """Without an attribute, with a ready loader, where nothing fits; and other errors are nobody's lack of memory."""

    class Plain(LightningDataModule):
        def train_dataloader(self) -> Any:
            return numbers()

    with pytest.raises(ConfigError, match="nothing to look for"):
        trainer().tune(Tiny(), numbers())
    with pytest.raises(ConfigError, match=r"nobody has 'batch_size'.*self\.batch_size in __init__"):
        trainer(auto_scale_batch_size=True).tune(Tiny(), datamodule=Plain())
    with pytest.raises(ConfigError, match="'rate'"):
        trainer(auto_lr_find="rate").tune(Tiny(), numbers())
    with pytest.raises(ConfigError, match="a loader that is passed"):
        Tuner(trainer()).scale_batch_size(Sized(), numbers())
    module = Sized(most=0)
    with pytest.raises(ConfigError, match="does not fit into memory"):
        Tuner(trainer()).scale_batch_size(module)
    assert module.batch_size == 4

    class Wrong(Sized):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            raise RuntimeError("another mistake")

    with pytest.raises(RuntimeError, match="another mistake"):
        Tuner(trainer()).scale_batch_size(Wrong())
