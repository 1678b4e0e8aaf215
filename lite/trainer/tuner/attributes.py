"""Where a tuned value lives: an attribute or hyperparameter of the module or the datamodule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lite.errors import ConfigError


class Tuned:
    """One value under a name, in every object that has it.

    Args:
        what: What it is, for errors.
        owners: Module and datamodule, or None.
        names: The names that it may have; the first that is there counts.

    Raises:
        ConfigError: None of them is there.
    """

    def __init__(self, what: str, owners: Sequence[Any], names: Sequence[str]) -> None:
        self._owners = [owner for owner in owners if owner is not None]
        for self.name in names:
            if any(self._places(self.name)):
                return
        shown = " or ".join(repr(name) for name in names)
        raise ConfigError(
            f"nobody has {shown} to put the {what} into; set self.{names[0]} in __init__ (or save_hyperparameters with "
            f"{names[0]}), and use it where the {what} is needed, or give the attribute's name."
        )

    def _places(self, name: str) -> list[tuple[Any, bool]]:
        places = [(owner, False) for owner in self._owners if name in vars(owner)]
        return places + [(owner.hparams, True) for owner in self._owners if name in owner.hparams]

    @property
    def value(self) -> Any:
        """The present value."""
        place, is_hparams = self._places(self.name)[0]
        return place[self.name] if is_hparams else getattr(place, self.name)

    @value.setter
    def value(self, value: Any) -> None:
        for place, is_hparams in self._places(self.name):
            if is_hparams:
                place[self.name] = value
            else:
                setattr(place, self.name, value)
