"""One optimizer's steps between two moments at which the ranks have the same weights, under LocalSGDStrategy."""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.disguise import disguise
from lite.errors import ConfigError, shown
from lite.fitting import check_fit
from lite.state import parameters_of, plain_key
from lite.swapped import is_swapped, refuse_swapped

OuterOptimizer = Callable[[list[nn.Parameter]], Optimizer]
Place = tuple[str, str]  # a checkpoint's entry, and the key in it


class Versions(NamedTuple):
    """By which torch counts changes of a round's tensors."""

    held: list[int]
    buffers: list[int]


class _Own(NamedTuple):
    """What is this rank's alone while the shared values are in its place."""

    inner: dict[Any, Any]
    values: dict[int, Tensor]


class Round:
    """What one optimizer's parameters were when the ranks last agreed, and how many steps ago that was.

    Args:
        optimizer: The inner optimizer; its step is followed until `release`.
        held: Its parameters.
        sync_every: Steps of a round.
        outer: Makes the outer optimizer, or None.
        modules: The set-up models, whose buffers are averaged too.

    Attributes:
        held: The parameters.
        count: Steps since the ranks last agreed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        held: list[nn.Parameter],
        sync_every: int,
        outer: OuterOptimizer | None,
        modules: Iterable[weakref.ref[nn.Module]],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.held = held
        self._sync_every = sync_every
        self.count = 0
        mine = {id(p) for p in held}
        self._modules = [
            ref for ref in modules if (m := ref()) is not None and any(id(p) in mine for p in m.parameters())
        ]
        self._start = [nn.Parameter(p.detach().clone()) for p in held] if outer is not None else []
        self._outer = make_outer(outer, self._start) if outer is not None else None
        self._own: _Own | None = None
        self._raw = type(optimizer)
        self._patched = optimizer.__dict__.pop("step", None)
        step = self._step(self._patched or self._raw.step.__get__(optimizer))
        disguise(optimizer, {"step": step, "state_is_local": True})

    def holds(self, module: nn.Module) -> bool:
        """Whether the model's parameters are among those that it is for."""
        return any(ref() is module for ref in self._modules)

    def release(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.__class__ = self._raw
            if self._patched is not None:
                optimizer.__dict__["step"] = self._patched

    def _step(self, below: Callable[..., Any]) -> Callable[..., Any]:
        inside = False
        reference = weakref.ref(self)
        unbound: Any = getattr(below, "__func__", None)

        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            take = below if unbound is None else unbound.__get__(self)
            if inside:  # a loss scaler calls the step of the optimizer that it is given
                return take(*args, **kwargs)
            part = reference()
            if part is not None:
                refuse_swapped(f"{type(self).__name__}.step()", part.held)
            inside = True
            self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
            if part is not None and part.count == 0:
                part.note_start()
            try:
                value = take(*args, **kwargs)
            finally:
                inside = False
            if part is not None:
                part.advance()
            return value

        step.hooked = step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return step

    def note_start(self) -> None:
        """A round begins with the weights as they are now, whoever has put them there."""
        _copy(self._start, self.held if self._start else ())

    def advance(self) -> None:
        """One more step was asked for; at the last of a round, bring the ranks together."""
        self.count += 1
        if self.count >= self._sync_every:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Bring the ranks together, after however many steps. Collective: call on all ranks."""
        self.count = 0
        if self._outer is None:
            _average(self.held)
        else:
            # Delta = mean over ranks of theta(t-1) - theta_i(t); theta(t) = OuterOpt(theta(t-1), Delta)
            deltas = [start - p.to(start.dtype) for start, p in zip(self._start, self.held, strict=True)]
            _average(deltas)
            for start, delta in zip(self._start, deltas, strict=True):
                start.grad = delta
            self._outer.step()
            self._outer.zero_grad()
            _copy(self.held, self._start)
        _average(self._buffers())

    def _inner(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def _buffers(self) -> list[Tensor]:
        modules = [module for ref in self._modules if (module := ref()) is not None]
        return [b for module in modules for b in module.buffers() if b.is_floating_point()]

    # ---- checkpoints

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within it all ranks hold the same values. Collective: call on all ranks.

        Averages that stand in the place of weights are the same on all ranks, and what is to be saved.
        """
        optimizer = self._inner()
        starts = dict(zip(map(id, self.held), self._start, strict=False))  # none without an outer optimizer
        held = [p for p in self.held if self.count and not is_swapped(p)]
        buffers = [b for b in self._buffers() if not is_swapped(b)]
        tensors = [*held, *buffers]
        mine = [t.detach().clone() for t in tensors]
        state = optimizer.state
        self._own = _Own(
            optimizer.state_dict()["state"], {id(t): value for t, value in zip(tensors, mine, strict=True)}
        )
        if self._outer is None:
            _average(held)
        else:
            _copy(held, [starts[id(p)] for p in held])
        _average(buffers)
        if collectives.world_size() > 1:
            firsts = collectives.broadcast([state.get(p) for p in self.held])
            if collectives.rank():
                optimizer.state = defaultdict(
                    dict, {p: first for p, first in zip(self.held, firsts, strict=True) if first is not None}
                )
        try:
            yield
        finally:
            optimizer.state = state
            _copy(tensors, mine)
            self._own = None

    def own_state(self, state: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is this rank's, where the checkpoint has the round's model and optimizer; None where it hasn't.

        Args:
            state: The user's objects by name.
            content: What the checkpoint has for each.
        """
        optimizer, places = self._inner(), _places(state, content)
        name = next((n for n, value in state.items() if value is optimizer and _is_whole(content.get(n))), None)
        if name is None or any(id(p) not in places for p in self.held):
            return None
        buffers = [b for b in self._buffers() if id(b) in places]
        own = self._own or _Own(optimizer.state_dict()["state"], {})

        def value(tensor: Tensor) -> Tensor:
            return own.values[id(tensor)] if id(tensor) in own.values else tensor.detach().clone()

        return {
            "optimizer": name,
            "parameters": [places[id(p)][0] for p in self.held],
            "count": self.count,
            "inner": own.inner,
            "weights": [value(p) for p in self.held] if self.count else None,
            "buffers": [(places[id(b)][0], value(b)) for b in buffers],
            "outer": self._outer.state_dict() if self._outer is not None else None,
        }

    def find(
        self, kept: Sequence[dict[str, Any]], state: Mapping[str, Any], loaded: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Which of the states kept is this round's: its optimizer and all that it trains are about to be loaded, from
        the entries that they were saved in. None where that is not so.

        Raises:
            CheckpointError: It doesn't fit the optimizer.
        """
        optimizer, places = self._inner(), _places(state, loaded)
        for one in kept:
            name, saved = one["optimizer"], [tuple(place) for place in one["parameters"]]
            if state.get(name) is not optimizer or not _is_whole(loaded.get(name)) or len(saved) != len(self.held):
                continue
            if any(place not in places.get(id(p), ()) for place, p in zip(saved, self.held, strict=True)):
                continue
            check_fit(optimizer, {**loaded[name], "state": one["inner"]}, name, strict=True)
            if self._outer is not None and one["outer"] is not None:
                check_fit(self._outer, one["outer"], f"outer optimizer of {name}", strict=True)
            targets = {place: b for b in self._buffers() for place in places.get(id(b), ())}
            buffers = [(targets[tuple(place)], value) for place, value in one["buffers"] if tuple(place) in targets]
            return {**one, "buffers": buffers}
        return None

    def versions(self) -> Versions:
        """To tell later what has been changed."""
        return Versions([p._version for p in self.held], [b._version for b in self._buffers()])

    @torch.no_grad()
    def begin(self, before: Versions) -> None:
        """Begin a new round with what was loaded. Collective where not all of the round was.

        Args:
            before: What `versions` was before anything was loaded, which is the same on all ranks.
        """
        if self.count:  # what was not loaded is each rank's own
            tensors = [*self.held, *self._buffers()]
            versions = [*before.held, *before.buffers]
            _average([t for t, version in zip(tensors, versions, strict=True) if t._version == version])
        self.count = 0

    def go_on(self, kept: dict[str, Any], *, exact: bool) -> None:
        """Go on in the middle of a round, whose model and optimizer have been loaded as all ranks share them.

        Args:
            kept: What `find` returned.
            exact: Whether it is this rank's, or another number of ranks begins a new round.
        """
        self.note_start()
        if self._outer is not None and kept["outer"] is not None:
            self._outer.load_state_dict(kept["outer"])
        self.count = kept["count"] if exact else 0
        if not exact:
            return
        optimizer = self._inner()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": kept["inner"]})
        if kept["weights"] is not None:
            _copy(self.held, kept["weights"])
        for buffer, value in kept["buffers"]:
            buffer.copy_(value)


def make_outer(outer: OuterOptimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """Call the user's `outer_optimizer`.

    Raises:
        ConfigError: What it returns is no optimizer, can't step on the gradients alone, or holds other parameters than
            it was given: a sync would put back those that are left out.
    """
    made = outer(parameters)
    if not isinstance(made, Optimizer):
        raise ConfigError(f"outer_optimizer returned {shown(made)}; it must return a torch optimizer.")
    try:
        inspect.signature(type(made).step).bind(made)  # a scheduler has put another into the instance
    except TypeError:
        raise ConfigError(
            f"outer_optimizer returned {shown(made)}, whose step() needs a closure, and at a sync there is no loss to "
            "evaluate again, but the ranks' mean change alone; return one that steps on gradients, e.g. "
            "torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)."
        ) from None
    given, held = {id(p) for p in parameters}, {id(p) for p in parameters_of(made)}
    if held != given:
        missing, foreign = len(given - held), len(held - given)
        wrong = [f"leaves out {missing} of the {len(given)} parameters that it was given"] * bool(missing)
        wrong += [f"holds others ({foreign})"] * bool(foreign)
        raise ConfigError(
            f"outer_optimizer returned {shown(made)} that {' and '.join(wrong)}, and each sync gives the model what it "
            "has stepped on; let it hold all of its argument and nothing else. Parameters that are to become their "
            "mean over the ranks go into a group of SGD with lr=1.0, momentum=0 and nesterov=False."
        )
    return made


def _places(state: Mapping[str, Any], content: Mapping[str, Any]) -> dict[int, list[Place]]:
    """Where the checkpoint has the tensors of the modules in `state`, by their ids."""
    found: dict[int, list[Place]] = {}
    for name, module in state.items():
        if not isinstance(module, nn.Module) or not isinstance(content.get(name), Mapping):
            continue
        tensors = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        for key, tensor in tensors:
            if plain_key(key) in content[name]:
                found.setdefault(id(tensor), []).append((name, plain_key(key)))
    return found


def _is_whole(content: Any) -> bool:
    """Whether it is an optimizer's whole state, of which no filter has taken a part."""
    return isinstance(content, Mapping) and {"state", "param_groups"} <= content.keys()


@torch.no_grad()
def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)


def _average(tensors: Sequence[Tensor]) -> None:
    """Replace each by its mean over the ranks, in few messages. Collective: call on all ranks."""
    size = collectives.world_size()
    if size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.all_reduce(flat)
        flat /= size
        for tensor, part in zip(alike, torch.split(flat, [t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))
