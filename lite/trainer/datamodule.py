"""`LightningDataModule`: everything about the data in one class, to be handed to any Trainer method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset

from lite.trainer.hparams import HyperparametersMixin, of_the_class
from lite.trainer.module_hooks import DataHooks

D = TypeVar("D", bound="LightningDataModule")


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Override `setup` and the loaders; `prepare_data` for what one process does for all.

    Attributes:
        trainer: The Trainer whose run this is, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """A Trainer's run begins (or ends, with None)."""
        self.trainer = trainer

    def on_exception(self, exception: BaseException) -> None:
        """A run ends by an exception."""

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to what is saved."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out what was added."""

    @classmethod
    def from_datasets(
        cls: type[D],
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> D:
        """A datamodule over datasets that are there; training shuffles.

        Args:
            train_dataset: A dataset, or a list or dict of them; likewise the others.
            val_dataset: See above.
            test_dataset: See above.
            predict_dataset: See above.
            batch_size: Samples per batch and process.
            num_workers: Worker processes per loader.
            **datamodule_kwargs: Arguments of the class.
        """

        def loader(dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)

        def loaders(given: Any, shuffle: bool = False) -> Any:
            if isinstance(given, Mapping):
                return {name: loader(dataset, shuffle) for name, dataset in given.items()}
            if isinstance(given, Sequence) and not isinstance(given, Dataset):
                return [loader(dataset, shuffle) for dataset in given]
            return loader(given, shuffle)

        made = cls(**datamodule_kwargs)
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for name, datasets in given.items():
            if datasets is not None:
                method = f"{name}_dataloader"
                made.__dict__[method] = lambda datasets=datasets, shuffle=name == "train": loaders(datasets, shuffle)
        return made

    @of_the_class
    def load_from_checkpoint(
        cls: type[D],
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> D:
        """Make the datamodule whose hyperparameters a checkpoint holds; `kwargs` outrank them."""
        from lite.trainer.checkpoints.loading import load_datamodule_from_checkpoint

        made: D = load_datamodule_from_checkpoint(cls, checkpoint_path, hparams_file, weights_only, kwargs)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}
