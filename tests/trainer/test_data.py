"""Behaviours 19 to 23: where data come from, and in which form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lite.errors import ConfigError
from lite.trainer import CombinedLoader, LightningDataModule, LightningModule
from tests.trainer.modules import Numbers, Tiny, TinyData, numbers, trainer


class Sees(Tiny):
    """Keeps what the batches are."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        return self.net[0].weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.batches.append((dataloader_idx, batch_idx))


def seen(train: Any, val: Any = None, **options: Any) -> list[Any]:
    module = Sees()
    trainer(**{"limit_val_batches": 0 if val is None else 1.0, **options}).fit(module, train, val)
    return module.batches


def test_behaviour_19_loaders_are_asked_for_once_or_as_often_as_told() -> None:
    """reload_dataloaders_every_n_epochs, in training and validation."""

    class Data(TinyData):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def train_dataloader(self) -> Any:
            self.calls.append(f"t{self.trainer.current_epoch}")
            return numbers(4)

        def val_dataloader(self) -> Any:
            self.calls.append(f"v{self.trainer.current_epoch}")
            return numbers(4)

    data = Data()
    trainer(max_epochs=3).fit(Tiny(), datamodule=data)
    assert data.calls == ["t0", "v0"]
    data = Data()
    trainer(max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(Tiny(), datamodule=data)
    assert data.calls == ["t0", "v0", "t2", "v2", "t4", "v4"]


def test_behaviour_19_the_same_loader_may_be_given_again_and_again() -> None:
    """Anew in each epoch, for training and validation, twice in a list, in a nested run: each goes its own way."""

    class Epochs(torch.utils.data.SequentialSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter([(i + self.epoch) % 4 for i in range(4)])

    data = torch.arange(4)
    loader = torch.utils.data.DataLoader(data, sampler=Epochs(data))
    found = seen(loader, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert [int(row) for row in found] == [0, 1, 2, 3, 1, 2, 3, 0, 2, 3, 0, 1]
    loader = numbers(8)
    one = trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1)
    module = Sees()
    one.fit(module, loader, loader)
    assert [type(batch) for batch in module.batches] == [Tensor, Tensor, tuple, tuple] * 2

    class Nested(Sees):
        def on_train_epoch_end(self) -> None:
            trainer().validate(Tiny(), loader, verbose=False)

    module = Nested()
    trainer(limit_val_batches=0).fit(module, loader)
    one.validate(module, [loader, loader], verbose=False)
    assert module.batches[-4:] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    trainer(limit_val_batches=0).fit(module, {"a": loader, "b": loader})
    assert set(module.batches[-1]) == {"a", "b"}


def test_behaviour_19_any_iterable_will_do() -> None:
    """Lists of batches, generators' makers, iterables without a length, with limits as numbers."""
    batches = list(Numbers(12).rows.split(4))
    assert len(seen(batches)) == 3

    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(4, 4, dtype=torch.float64)

    assert len(seen(Endless(), limit_train_batches=5)) == 5
    with pytest.raises(ConfigError, match=r"limit_train_batches=0.5 is a share of a loader without a length"):
        seen(Endless(), limit_train_batches=0.5)
    with pytest.raises(ConfigError, match="can't be iterated over"):
        seen(3)


def test_behaviour_20_training_loaders_may_be_nested() -> None:
    """max_size_cycle, or the mode that is asked for."""
    found = seen({"a": numbers(12), "b": [numbers(4), numbers(8)]})
    assert len(found) == 3
    assert set(found[0]) == {"a", "b"}
    assert torch.equal(found[2]["b"][0], found[0]["b"][0])
    assert len(seen([numbers(12), numbers(4)], multiple_trainloader_mode="min_size")) == 1
    combined = seen(CombinedLoader([numbers(12), numbers(4)], "max_size"))
    assert [batch[1] is None for batch in combined] == [False, True, True]
    with pytest.raises(ConfigError, match="mode='sequential'"):
        seen(CombinedLoader([numbers(4)], "sequential"))


def test_behaviour_20_evaluation_takes_loaders_one_after_another() -> None:
    """With batch numbers of each."""
    found = [one for one in seen(numbers(4), [numbers(8), numbers(4)]) if isinstance(one, tuple)]
    assert found == [(0, 0), (0, 1), (1, 0)]


def test_behaviour_20_evaluation_takes_loaders_in_any_nesting() -> None:
    """One after another, by the keys and numbers that lead to them; a list of ready batches is a loader."""
    batches = [torch.ones(2, 4), torch.ones(1, 4)]

    class Sizes(LightningModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("n", float(len(batch)), reduce_fx="sum")

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[int, int]:
            return dataloader_idx, len(batch)

    run, nested = trainer(), {"a": [numbers(4), {"x": numbers(5)}], "b": numbers(6), "c": batches}
    found = run.validate(Sizes(), nested, verbose=False)
    assert found == [{"a/0/n": 4}, {"a/1/x/n": 5}, {"b/n": 6}, {"c/n": 3}]
    assert run.predict(Sizes(), nested) == [[(0, 4)], [(1, 4), (1, 1)], [(2, 4), (2, 2)], [(3, 2), (3, 1)]]
    assert run.validate(Sizes(), [[numbers(4), numbers(5)], numbers(6)], verbose=False) == [
        {"n/dataloader_idx_0": 4},
        {"n/dataloader_idx_1": 5},
        {"n/dataloader_idx_2": 6},
    ]

    class Mine:
        def __iter__(self) -> Any:
            return iter(batches)

        def __len__(self) -> int:
            return 2

    own = {"a": [Mine(), [Mine()]], "b": [{"x": Mine()}]}
    assert run.validate(Sizes(), own, verbose=False) == [{f"{name}/n": 3} for name in ("a/0", "a/1/0", "b/0/x")]
    assert run.validate(Sizes(), [Mine(), Mine()], verbose=False) == [{f"n/dataloader_idx_{i}": 3} for i in (0, 1)]
    for ready in ([{"x": batch} for batch in batches], [tuple(batches)] * 2):
        for given in (ready, {"a": ready}):
            assert run.predict(Sizes(), given) == [(0, len(batch)) for batch in ready]
    with pytest.raises(ConfigError, match=r"have a Numbers at 'a/0', where a loader belongs"):
        run.validate(Sizes(), {"a": [Numbers(4), Numbers(4)]})
    with pytest.raises(ConfigError, match=r"to validate have a Tensor at 'a/x', where a loader belongs: pass a loader"):
        run.validate(Sizes(), {"a": {"x": torch.ones(2)}})
    with pytest.raises(ConfigError, match=r"two loaders named 'a/0'; give their keys different names"):
        run.validate(Sizes(), {"a": [numbers(4)], "a/0": numbers(4)})


def test_a_list_of_ready_batches_trains_wherever_it_stands() -> None:
    """Alone, or drawn from together with loaders; also where the batches are dicts."""
    seen: list[Any] = []

    class Takes(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch)
            return self.loss(batch["x"])

    ready = [{"x": batch} for batch in numbers(8)]
    trainer(limit_val_batches=0).fit(Takes(), ready)
    trainer(limit_val_batches=0).fit(Takes(), {"x": numbers(8), "y": ready})
    assert all(given is batch for given, batch in zip(seen[:2], ready, strict=True))
    assert all(given["y"] is batch for given, batch in zip(seen[2:], ready, strict=True))


@pytest.mark.parametrize(("mode", "lengths"), [("min_size", [4]), ("max_size_cycle", [4, 4]), ("max_size", [4, 0])])
def test_behaviour_20_evaluation_draws_from_a_combined_loader(mode: str, lengths: list[int]) -> None:
    """All loaders make one batch, in validation, test and prediction; limits and the sanity check count these."""

    class Pairs(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("sum", float(len(batch["b"]) if batch["b"] is not None else 0), reduce_fx="sum")

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return 0 if batch["b"] is None else len(batch["b"])

    module, loader = Pairs(), CombinedLoader({"a": numbers(8), "b": numbers(4)}, mode)
    run = trainer(num_sanity_val_steps=1)
    run.fit(module, numbers(), loader)
    assert run.num_val_batches == [len(lengths)]
    assert float(run.callback_metrics["sum"]) == sum(lengths)
    assert run.test(module, loader, verbose=False) == [{"sum": sum(lengths)}]
    assert run.predict(module, loader) == lengths
    assert trainer(limit_val_batches=1).validate(module, loader, verbose=False) == [{"sum": 4}]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [(1, 4)]),
        ("max_size_cycle", [(1, 4), (2, 4), (3, 4)]),
        ("max_size", [(1, 4), (2, None), (3, None)]),
        ("sequential", [1, 2, 3, 4]),
    ],
)
def test_combined_loaders_draw_as_their_mode_says(mode: str, expected: list[Any]) -> None:
    """The batch has the nesting of the loaders; its length is right."""
    loader = CombinedLoader((range(1, 4), range(4, 5)), mode)
    assert [batch for batch, _, _ in loader] == expected
    assert len(loader) == len(expected)


def test_the_shortest_loader_ends_a_combined_one_before_others_draw() -> None:
    """What nobody gets is not drawn, so an epoch's end leaves the same random state, resumed or not."""
    drawn: list[int] = []

    class Draws(Numbers):
        def __getitem__(self, index: int) -> Tensor:
            drawn.append(index)
            return super().__getitem__(index)

    longer = DataLoader(Draws(8), batch_size=2)
    assert len(list(CombinedLoader([longer, numbers(4, 2)], "min_size"))) == 2
    assert drawn == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataloaders": Numbers(4)}, r"of type Numbers was given as a loader.*wrap it: DataLoader\(dataset"),
        (
            {"datamodule": TinyData},
            r"datamodule=the class TinyData is no LightningDataModule.*pass an instance, TinyDa",
        ),
        ({"datamodule": numbers(4)}, r"datamodule=a DataLoader is no LightningDataModule.*or loaders as loaders"),
    ],
)
def test_what_is_no_data_is_told_what_would_be(arguments: dict[str, Any], message: str) -> None:
    """By its kind."""
    with pytest.raises(ConfigError, match=message):
        trainer(limit_val_batches=0).fit(Tiny(), **arguments)


@pytest.mark.filterwarnings("ignore:nothing is left to train")
def test_behaviour_41_combined_loaders_go_on_where_they_were(tmp_path: Any) -> None:
    """Each loader from its own position, in mid-cycle too."""

    def loaders() -> Any:
        return {"a": numbers(20, shuffle=True), "b": numbers(8, shuffle=True)}

    whole = Sees()
    trainer(max_epochs=2, limit_val_batches=0).fit(whole, loaders())
    for point in range(1, 11):
        torch.manual_seed(5)
        module, run = Sees(), trainer(max_epochs=2, limit_val_batches=0)
        for number, _ in enumerate(run.steps(module, loaders(), events=("batch",)), start=1):
            if number == point:
                run.save_checkpoint(tmp_path / "x.ckpt")
        again = Sees()
        trainer(max_epochs=2, limit_val_batches=0).fit(again, loaders(), ckpt_path=tmp_path / "x.ckpt")
        rest = whole.batches[len(whole.batches) - len(again.batches) :]
        assert len(again.batches) == 10 - point
        for one, other in zip(again.batches, rest, strict=True):
            assert torch.equal(one["a"], other["a"])
            assert torch.equal(one["b"], other["b"])


def test_behaviour_21_shuffled_evaluation_is_told() -> None:
    """Its batches differ from run to run."""
    with pytest.warns(UserWarning, match="loader for validate shuffles"):
        trainer().validate(Tiny(), numbers(shuffle=True), verbose=False)


def test_behaviour_22_the_datamodules_life() -> None:
    """prepare_data, setup and teardown with the stage; from_datasets; transfer hooks of a datamodule win."""
    calls: list[str] = []

    class Data(TinyData):
        def prepare_data(self) -> None:
            calls.append("prepare")

        def setup(self, stage: str) -> None:
            calls.append(f"setup {stage}")

        def teardown(self, stage: str) -> None:
            calls.append(f"teardown {stage}")

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch * 0

    module, run, data = Sees(), trainer(limit_train_batches=1, limit_val_batches=0), Data()
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert calls == ["prepare", "setup fit", "teardown fit", "prepare", "setup test", "teardown test"]
    assert float(module.batches[0].abs().sum()) == 0
    made = LightningDataModule.from_datasets(Numbers(8), [Numbers(4), Numbers(4)], batch_size=4)
    assert len(seen(made, None, limit_val_batches=1.0)) == 2 + 2
    with pytest.raises(ConfigError, match="pass one of them"):
        trainer().fit(module, numbers(), datamodule=data)


def test_transfer_hooks_of_the_module_are_used() -> None:
    """before, transfer, after; with the loader's number."""

    class Moves(Sees):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"x": batch}

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            assert device == torch.device("cpu")
            return batch["x"] + 1

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Any:
            return batch * 0 + 7 + dataloader_idx

    module = Moves()
    trainer(limit_train_batches=1, limit_val_batches=0).fit(module, numbers())
    assert set(module.batches[0].flatten().tolist()) == {7.0}
