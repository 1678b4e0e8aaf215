"""Behaviour 45: gradients of several batches, and of several ranks' tokens, are those of one big batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lite.errors import ConfigError, UsageError
from tests.support.processes import run_distributed
from tests.trainer.modules import Numbers, Tiny, by_hand, numbers, trainer, weights

OPTIONS = {"limit_val_batches": 0}


@pytest.mark.parametrize(("count", "steps"), [(16, 2), (12, 2), (10, 2), (22, 4), (6, 8)])
def test_behaviour_45_accumulation_gives_the_gradient_of_one_big_batch(count: int, steps: int) -> None:
    """Full windows, partial last ones and ragged last batches alike."""
    sizes = [min(4, count - start) for start in range(0, count, 4)]
    windows = [sizes[i : i + steps] for i in range(0, len(sizes), steps)]
    module = Tiny()
    trainer(accumulate_grad_batches=steps, **OPTIONS).fit(module, numbers(count))
    assert weights(module) == pytest.approx(by_hand(count, windows), rel=0, abs=1e-14)


class Watched(Tiny):
    """What a step consists of, by name; the optimizer's rate halves with each step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("hook")
        self.log("norm", nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_epoch_end(self) -> None:
        self.calls.append(f"rate {self.trainer.optimizers[0].param_groups[0]['lr']}")


class WatchedByOverride(Watched):
    """The same through `optimizer_step`."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        self.calls.append(f"step at {batch_idx}")


class Stream:
    """Batches of ten rows, and nobody knows how many."""

    def __iter__(self) -> Any:
        return iter(Numbers(10).rows.split(4))


@pytest.mark.parametrize("kind", [Watched, WatchedByOverride])
def test_behaviour_45_the_last_window_of_a_loader_without_length_steps_too(kind: type[Watched]) -> None:
    """Nobody knows that a batch was the last before another is asked for; clipping, hooks and rates are the same."""
    module, run = Tiny(), trainer(accumulate_grad_batches=2, **OPTIONS)
    run.fit(module, Stream())
    assert run.global_step == 2
    assert weights(module) == pytest.approx(by_hand(10, [[4, 4], [2]]), rel=0, abs=1e-14)

    found = []
    for loader in (numbers(10), Stream()):
        watched, run = kind(), trainer(accumulate_grad_batches=2, gradient_clip_val=1e-3, max_epochs=2, **OPTIONS)
        run.fit(watched, loader)
        found.append((watched.calls, run.global_step, run.fit_loop.progress.stepped, weights(watched)))
    assert found[0][:3] == found[1][:3]
    assert found[0][0].count("hook") == found[0][1] == 4
    assert found[0][3] == pytest.approx(found[1][3], rel=0, abs=1e-14)


def test_a_window_steps_where_a_hook_ends_the_epoch_within_it() -> None:
    """`on_train_batch_start` returns -1; schedulers by the epoch step too, as in the reference."""

    class Ends(Watched):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 3 else None

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    module, run = Ends(), trainer(accumulate_grad_batches=2, **OPTIONS)
    run.fit(module, numbers(20))
    assert weights(module) == pytest.approx(by_hand(20, [[4, 4], [4]]), rel=0, abs=1e-14)
    assert (run.global_step, module.calls) == (2, ["hook", "hook", "rate 0.025"])


class FirstSix(Sampler[int]):
    """Six of the rows."""

    def __iter__(self) -> Any:
        return iter(range(6))

    def __len__(self) -> int:
        return 6


class Bunches(Sampler[list[int]]):
    """Batches of one, three and two rows."""

    def __iter__(self) -> Any:
        return iter([[0], [1, 2, 3], [4, 5]])

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("count", [8, 6])
@pytest.mark.parametrize(
    ("loader", "sizes", "samples"),
    [
        (lambda rows: DataLoader(rows, batch_size=4, sampler=FirstSix()), [4, 2], 6),
        (lambda rows: DataLoader(rows, batch_size=4, sampler=FirstSix(), drop_last=True), [4], 4),
        (lambda rows: DataLoader(rows, batch_sampler=Bunches()), [1, 3, 2], 0),
        (lambda rows: list(rows.rows[:6].split([3, 1, 2])), [3, 1, 2], 0),
    ],
)
def test_behaviour_45_counts_what_the_sampler_gives(loader: Any, sizes: list[int], samples: int, count: int) -> None:
    """Not what the dataset has; the clock of samples is 0 where nobody but the sampler knows."""
    rows = Numbers(count)
    module, run = Tiny(), trainer(accumulate_grad_batches=2, **OPTIONS)
    run.fit(module, loader(rows))
    windows = [sizes[:2], sizes[2:]] if sizes[2:] else [sizes]
    assert weights(module) == pytest.approx(by_hand(rows, windows), rel=0, abs=1e-14)
    assert run.clocks()["samples"] == samples


class OfFirst(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch["a"])


def test_behaviour_45_several_loaders_may_end_in_the_middle() -> None:
    """One that begins anew has a ragged batch in each window; where all are full, nobody looks at their sizes."""
    module, rows = OfFirst(), Numbers(6)
    with pytest.warns(UserWarning, match="batch_size"):
        trainer(accumulate_grad_batches=2, **OPTIONS).fit(module, {"a": DataLoader(rows, 4), "b": numbers(16)})
    by = Tiny()
    optimizer = torch.optim.SGD(by.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        by.loss(rows.rows).backward()
        optimizer.step()
    assert weights(module) == pytest.approx(weights(by), rel=0, abs=1e-14)
    trainer(accumulate_grad_batches=2, **OPTIONS).fit(OfFirst(), {"a": numbers(16), "b": numbers(8, 2)})


def test_behaviour_45_a_run_goes_on_in_a_window_that_is_weighed(tmp_path: Path) -> None:
    """In the window that the ragged batch ends."""
    module, run = Tiny(), trainer(accumulate_grad_batches=2, **OPTIONS)
    for event in run.steps(module, numbers(14), events=("batch",)):
        if event.batch_idx == 2:
            run.save_checkpoint(tmp_path / "open.ckpt")
    again = Tiny()
    trainer(accumulate_grad_batches=2, **OPTIONS).fit(again, numbers(14), ckpt_path=tmp_path / "open.ckpt")
    assert weights(again) == weights(module) == pytest.approx(by_hand(14, [[4, 4], [4, 2]]), rel=0, abs=1e-14)


def test_behaviour_45_a_batch_that_is_left_out_has_no_weight() -> None:
    """None within a window of tokens."""

    class Leaves(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx == 1 else {"loss": self.loss(batch), "weight": len(batch)}

    module = Leaves()
    with pytest.warns(UserWarning, match="left out"):
        trainer(accumulate_grad_batches=3, **OPTIONS).fit(module, numbers())
    by, rows = Tiny(), Numbers(12).rows
    optimizer = torch.optim.SGD(by.parameters(), lr=0.05)
    by.loss(torch.cat([rows[:4], rows[8:]])).backward()
    optimizer.step()
    assert weights(module) == pytest.approx(weights(by), rel=0, abs=1e-14)


class Tokens(Tiny):
    """A mean over the rows whose second number is large: a few, and not as many in each batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        counts = batch[:, 1] > 0.4
        errors = (self(batch)[:, 0] - batch[:, 0]).pow(2)
        return {"loss": (errors * counts).sum() / counts.sum().clamp(min=1), "weight": counts.sum()}


class OwnBackward(Tokens):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)


class ThroughLite(Tokens):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)


class OwnStep(Tokens):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


def by_tokens(batch_size: int) -> list[float]:
    """Seventeen rows, weights and ragged batches, alone and by three, each as the module has its way."""
    found: list[float] = []
    for accumulate in (1, 3):
        for kind in (Tokens, OwnBackward, ThroughLite, OwnStep):
            module = kind()
            trainer(accumulate_grad_batches=accumulate, strategy="ddp", **OPTIONS).fit(module, numbers(17, batch_size))
            found.append(sum(weights(module)))
            if kind is not Tokens and accumulate > 1:
                module = kind()
                module.training_step = lambda batch, batch_idx, module=module: module.loss(batch)  # type: ignore[method-assign]
                options = {"accumulate_grad_batches": 2, "strategy": "ddp", **OPTIONS}
                trainer(**options).fit(module, numbers(17, batch_size))
                found.append(sum(weights(module)))
    return found


def tokens_by_hand(accumulate: int) -> float:
    module = Tokens()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for batch in Numbers(17).rows.split(4 * accumulate):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    return sum(weights(module))


def test_behaviour_45_weights_and_sizes_count_with_overrides_and_over_ranks() -> None:
    """One batch per step or three, `backward` or `optimizer_step` overridden: the mean over all ranks' tokens."""
    plain = sum(by_hand(17, [[8], [8], [1]]))
    expected = [tokens_by_hand(1)] * 4
    expected += [tokens_by_hand(3), *[tokens_by_hand(3), plain] * 3]
    one = by_tokens(4)
    assert one == pytest.approx(expected, rel=0, abs=1e-13)
    for rank in run_distributed(by_tokens, 2):
        assert rank == pytest.approx(expected, rel=0, abs=1e-13)


def apart() -> tuple[list[float], float]:
    """Ranks with data of their own: of one's it is known that all batches have one size, of the other's it is not."""
    options = {"strategy": "ddp", "use_distributed_sampler": False, **OPTIONS}
    module, run = Tiny(), trainer(accumulate_grad_batches=2, **options)
    run.fit(module, list(Numbers(14).rows.split([2, 4, 4, 4])) if run.global_rank else numbers(16))
    run = trainer(**options)
    run.fit(Tiny(), numbers(10))
    return weights(module), run.clocks()["samples"]


def test_ranks_weigh_their_windows_alike_and_count_all_samples() -> None:
    """Also where they know different things of their own data."""
    by, first, second = Tiny(), Numbers(16).rows, Numbers(14).rows
    optimizer = torch.optim.SGD(by.parameters(), lr=0.05)
    for mine, others in ((first[:8], second[:6]), (first[8:], second[6:])):
        optimizer.zero_grad()
        by.loss(torch.cat([mine, others])).backward()
        optimizer.step()
    for found, samples in run_distributed(apart):
        assert found == pytest.approx(weights(by), rel=0, abs=1e-13)
        assert samples == 20


def test_weights_of_single_batches_change_nothing_on_one_process() -> None:
    """Bit for bit, but that a batch without tokens has no gradient."""
    found = []
    for kind in (Tokens, Tiny):
        module = kind()
        if kind is Tiny:
            module.training_step = lambda *args, module=module: Tokens.training_step(module, *args)["loss"]  # type: ignore[arg-type, method-assign]
        trainer(**OPTIONS).fit(module, numbers(16))
        found.append(weights(module))
    assert found[0] == found[1]

    class NoTokens(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "weight": 0}

    module = NoTokens()
    before = weights(module)
    trainer(**OPTIONS).fit(module, numbers())
    assert weights(module) == before


def test_behaviour_45_weights_count_tokens_and_the_reference_divides_by_the_full_window() -> None:
    """{"loss", "weight"}, and accumulation="reference"."""

    class Tokens(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.loss(batch[: batch_idx + 1]), "weight": batch_idx + 1}

    module = Tokens()
    trainer(accumulate_grad_batches=3, **OPTIONS).fit(module, numbers())
    rows = Numbers(12).rows
    by = Tiny()
    picked = torch.cat([rows[:1], rows[4:6], rows[8:11]])
    optimizer = torch.optim.SGD(by.parameters(), lr=0.05)
    by.loss(picked).backward()
    optimizer.step()
    assert weights(module) == pytest.approx(weights(by), rel=0, abs=1e-14)

    reference = Tiny()
    trainer(accumulate_grad_batches=2, accumulation="reference", **OPTIONS).fit(reference, numbers())
    by = Tiny()
    optimizer = torch.optim.SGD(by.parameters(), lr=0.05)
    for start, end in ((0, 8), (8, 12)):
        optimizer.zero_grad()
        for batch in rows[start:end].split(4):
            (by.loss(batch) / 2).backward()
        optimizer.step()
    assert weights(reference) == weights(by)


class CallsTwice(Tiny):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step(closure=optimizer_closure)


def test_a_weight_that_is_no_number_is_refused() -> None:
    """With the value, and what else to do with it."""

    class Wrong(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.loss(batch), "weight": [1, 2]}

    for accumulate in (1, 2):
        with pytest.raises(ConfigError, match=r"'weight': \[1, 2\].*under another name"):
            trainer(accumulate_grad_batches=accumulate, **OPTIONS).fit(Wrong(), numbers())


def test_what_evaluates_its_closure_again_does_not_accumulate() -> None:
    """The second evaluation would have the last batch alone. Refused, with what to do instead."""

    class Newton(Tiny):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 with LBFGS.*larger batch size"):
        trainer(accumulate_grad_batches=2, **OPTIONS).fit(Newton(), numbers())
    with pytest.raises(UsageError, match=r"again in a window.*the last of 2 batches alone.*accumulate_grad_batches=1"):
        trainer(accumulate_grad_batches=2, **OPTIONS).fit(CallsTwice(), numbers())
    trainer(**OPTIONS).fit(CallsTwice(), numbers())
