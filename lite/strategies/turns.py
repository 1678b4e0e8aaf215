"""In which order models run within `lite.join`, and that nothing comes in another one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from lite.errors import UsageError


class Turns:
    """The order in which a rank that has no batches left answers the others' forwards and backwards within `lite.join`.

    It goes through the models again and again, and answers the forward and then the backward of each. What comes in
    another order would meet the wrong collective, for which gloo ends the process.

    Args:
        names: What stands for each model that averages gradients, in the order in which `lite.join` got them, and what
            errors call it.
    """

    def __init__(self, names: Mapping[Hashable, str]) -> None:
        self._order = list(names)
        many = len(names) > 1
        self._names = {
            model: f"{name} (model {number} of {len(names)})" if many else name
            for number, (model, name) in enumerate(names.items(), 1)
        }
        self._next = 0
        self._open: Hashable = None

    def begin(self, model: Hashable, *, synchronised: bool) -> None:
        """A forward under gradients, which tells the ranks that have no batches left.

        Args:
            model: The model; one that is not among them is nobody's turn.
            synchronised: Whether its backward averages gradients.

        Raises:
            UsageError: Another one is due, or a forward's backward has not been.
        """
        if model not in self._names:
            return
        if self._open is not None:
            raise UsageError(
                f"lite.join: a forward of {self._names[model]} came before the lite.backward of the forward of "
                f"{self._names[self._open]}, and ranks that have no batches left answer each forward together with its "
                "backward. Call lite.backward after each forward, with a loss of that model alone; what needs several "
                "forwards in one loss belongs into one (one module that holds both models, or one concatenated batch), "
                "and what is not trained on runs under torch.no_grad()."
            )
        due = self._order[self._next]
        if model is not due:
            raise UsageError(
                f"lite.join: a forward of {self._names[model]} came where one of {self._names[due]} was due: ranks "
                "that have no batches left answer the models in the order in which lite.join got them, each once per "
                "batch. Call them in that order, or give lite.join those that are trained on each batch."
            )
        self._next = (self._next + 1) % len(self._order)
        if synchronised:
            self._open = model

    def finish(self, model: Hashable) -> None:
        """The backward of the model's forward averages gradients now."""
        if model is self._open:
            self._open = None

    def end(self) -> None:
        """The block is left.

        Raises:
            UsageError: The last forward's backward has not been, or not each model's forward.
        """
        if self._open is not None:
            raise UsageError(
                f"lite.join: the block ended before the lite.backward of the last forward of {self._names[self._open]}"
                ", for which the other ranks wait; what is not trained on runs under torch.no_grad()."
            )
        if self._next:
            raise UsageError(
                f"lite.join: the block ended where a forward of {self._names[self._order[self._next]]} was due: ranks "
                "that have no batches left answer all models that lite.join got for each batch; give it those that are "
                "trained on each."
            )
