"""What one `Lite` has set up: checked before anything is changed, kept, explained, and given back as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset

from lite import collectives
from lite.data.shares import BatchWeight
from lite.errors import ConfigError, UsageError, shown
from lite.precision.base import Precision
from lite.state import parameters_of
from lite.strategies.base import Engine, Strategy
from lite.wrapping.module import check_class, unwrap_module, wrap_module
from lite.wrapping.optimizer import (
    check_optimizer,
    unwrap_optimizer,
    unwrap_scheduler,
    wrap_scheduler,
)

AfterStep = Callable[[Strategy, Optimizer], Any]

_owners: weakref.WeakKeyDictionary[Any, weakref.ref[Prepared]] = weakref.WeakKeyDictionary()
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_hooks: weakref.WeakKeyDictionary[Optimizer, list[Any]] = weakref.WeakKeyDictionary()


class Prepared:
    """The models, optimizers, schedulers and loaders of one connected `Lite`.

    Args:
        strategy: Puts an engine around a model, or nothing.
        precision: Converts models, and goes around their calls and around steps.

    Attributes:
        modules: The models that are set up, each with its engine.
        optimizers: The optimizers that are set up.
        weight: What the current batch counts; loaders write it.
        clipped: The optimizers whose gradients are clipped, each with the model that was named with it.
        facts: What was done, a line each, for `explain`.
    """

    def __init__(self, strategy: Strategy, precision: Precision) -> None:
        self._strategy = strategy
        self._precision = precision
        self.modules: dict[nn.Module, Engine | None] = {}
        self.weight = BatchWeight()
        self.clipped: dict[Optimizer, nn.Module | None] = {}
        self.facts: list[str] = []
        self.optimizers: list[Optimizer] = []
        self._schedulers: list[LRScheduler] = []
        self._loaders: list[DataLoader[Any]] = []

    def check(self, call: str, models: Sequence[Any], others: Sequence[Any]) -> None:
        """Refuse what can't be set up, while everything is still as the user made it.

        Args:
            call: What the user called.
            models: The model, or nothing where optimizers follow a model that is set up.
            others: Optimizers and schedulers.

        Raises:
            ConfigError: Something is of a wrong type or can't be set up, or an optimizer or a scheduler belongs to
                objects that aren't.
            UsageError: Something is set up already, or given twice.
        """
        for model in models:
            if not isinstance(model, nn.Module):
                raise ConfigError(f"{call} got {shown(model)} as the model; pass a torch.nn.Module first.")
        for other in others:
            if not isinstance(other, (Optimizer, LRScheduler)):
                raise ConfigError(_misplaced(call, other))
        self._check_free([*models, *others])
        for model in models:
            _check_tensors(model)
            self._check_overlap(model)
            if self._precision.changes_forward:
                check_class(model)
            self._strategy.check_module(model)
        optimizers = [o for o in others if isinstance(o, Optimizer)]
        self._check_parameters(models, optimizers)
        for optimizer in optimizers:
            check_optimizer(optimizer, self._precision)
            self._strategy.check_new_optimizer(optimizer)
        self._check_schedulers([s for s in others if isinstance(s, LRScheduler)], optimizers)

    def check_loaders(self, loaders: Sequence[Any], shard: str | None) -> None:
        """Refuse loaders that are set up already, or given twice, and a `shard` that is for none of them."""
        known = [loader for loader in loaders if isinstance(loader, DataLoader)]
        self._check_free(known)
        if shard is not None and known and not any(isinstance(loader.dataset, IterableDataset) for loader in known):
            name = type(known[0].dataset).__name__
            raise ConfigError(
                f"shard={shard!r} is for IterableDatasets, and this loader's {name} has indices, by which it is split "
                "without being asked; leave shard out."
            )

    def add_module(self, model: nn.Module, device: torch.device, *, move: bool) -> None:
        """Convert a checked model, bring it to the device, and put around it what strategy and precision need."""
        precision = self._strategy.forward_precision(self._precision)
        deferred = None
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            from lite.deferred import Deferred, allocate

            deferred = Deferred(model)
        name = type(model).__name__
        self._precision.convert_module(model)
        if deferred is not None and not self._strategy.moves_modules:
            allocate(model, device)
            deferred.fill(device, collectives.broadcast)
        if move and not self._strategy.moves_modules:
            model.to(device)
        engine = collectives.explained(self._strategy.wrap)(model, device)
        if deferred is not None and self._strategy.moves_modules:
            deferred.fill(device, collectives.broadcast)
        try:
            wrap_module(model, engine=engine, precision=precision, device=device)
        except Exception:
            if engine is not None:
                engine.close()
            raise
        self.modules[model] = engine
        if engine is not None:
            _engines[model] = weakref.ref(engine)
        self._own(model)
        done = self._strategy.explain(model)
        self.facts.append(f"{name}: {done}; precision {self._precision.name}")

    def add_optimizers(
        self, others: Sequence[Any], prepare: Callable[[Optimizer], None], after_step: Sequence[AfterStep] = ()
    ) -> None:
        """Let checked optimizers and schedulers step as `prepare` does it, and tell `after_step` of each step."""
        for optimizer in [o for o in others if isinstance(o, Optimizer)]:
            prepare(optimizer)
            self.optimizers.append(optimizer)
            self.weight.trains = True
            self._own(optimizer)
            if after_step:
                _hooks[optimizer] = [
                    optimizer.register_step_post_hook(_post_hook(tell, self._strategy)) for tell in after_step
                ]
        for scheduler in [s for s in others if isinstance(s, LRScheduler)]:
            wrap_scheduler(scheduler, self._precision)
            self._schedulers.append(scheduler)
            self._own(scheduler)

    def add_loaders(self, loaders: Sequence[DataLoader[Any]], facts: Sequence[str]) -> None:
        """Remember the user's own loaders, so that they can be released."""
        for loader in loaders:
            self._own(loader)
        self._loaders.extend(loaders)
        self.facts.extend(facts)

    @contextmanager
    def adding(self, *things: Any) -> Iterator[None]:
        """A context that sets these up: where one of them is refused within it, all are given back."""
        num_facts = len(self.facts)
        try:
            yield
        except ConfigError:  # on all ranks alike
            self._give_back(things)
            del self.facts[num_facts:]
            for thing in things:
                self.modules.pop(thing, None)
            self.optimizers[:] = [one for one in self.optimizers if one not in things]
            self._schedulers[:] = [one for one in self._schedulers if one not in things]
            self.weight.trains = bool(self.optimizers)
            raise

    def _give_back(self, things: Sequence[Any]) -> None:
        for thing in things:
            _release(thing)
            if isinstance(thing, nn.Module):
                self._precision.release_module(thing)

    def release(self) -> None:
        """Give everything back, without a hook or patch."""
        self._give_back((*self.modules, *self.optimizers, *self._schedulers, *self._loaders))
        for kept in (self.modules, self.optimizers, self._schedulers, self._loaders, self.clipped, self.facts):
            kept.clear()
        self.weight.trains = False

    def _own(self, thing: Any) -> None:
        _owners[thing] = weakref.ref(self)

    def _check_free(self, things: Sequence[Any]) -> None:
        for i, thing in enumerate(things):
            if any(thing is other for other in things[:i]):
                raise UsageError(
                    f"the same {type(thing).__name__} was passed twice in one call; pass each object once."
                )
            if thing not in _owners:
                continue
            if _owners[thing]() is not None:
                gc.collect()  # a Lite that nobody holds any more may still stand in a cycle
            if _owners[thing]() is None:
                _release(thing)  # its Lite is gone: a notebook's cell was run again, say
                continue
            name = type(thing).__name__
            raise UsageError(
                f"this {name} is set up already; keep the result of the first call, or call lite.teardown() first."
            )

    def _check_overlap(self, model: nn.Module) -> None:
        """A parameter in two engines would be averaged by each of them, at different moments."""
        held = {id(p): other for other, _ in _live_engines() for p in other.parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) in held:
                other = type(held[id(parameter)]).__name__
                raise UsageError(
                    f"parameter {name!r} of this {type(model).__name__} belongs to a {other} that is set up already, "
                    "and each of the two would average its gradients by itself; set up one module that holds both, "
                    "once, and call its parts through methods of that module."
                )

    def _check_parameters(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Every optimizer must train set-up parameters: others would go their own way on each rank."""
        known = {id(p) for module in (*self.modules, *models) for p in module.parameters()}
        for optimizer in optimizers:
            held = parameters_of(optimizer)
            if any(p.is_meta and not self._strategy.holds_elsewhere(p) for p in held):
                raise ConfigError(
                    f"{type(optimizer).__name__} was made of parameters on the meta device, which setup exchanges for "
                    "real ones; set the model up first, and make the optimizer of what it has then: "
                    "`model = lite.setup(model)`, then `lite.setup_optimizers(AdamW(model.parameters()))`."
                )
            foreign = [p for p in held if id(p) not in known and self._strategy.successor(p) is None]
            if foreign:
                raise ConfigError(
                    f"{type(optimizer).__name__} holds {len(foreign)} of {len(held)} parameters (the first of shape "
                    f"{tuple(foreign[0].shape)}) that belong to no model that is set up; create it from "
                    "model.parameters() of the model that you pass to lite.setup, after the last change of the model."
                )

    def _check_schedulers(self, schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer]) -> None:
        known = [*self.optimizers, *optimizers]
        for scheduler in schedulers:
            paced = getattr(scheduler, "optimizer", None)
            if paced is not None and not any(paced is optimizer for optimizer in known):
                raise ConfigError(
                    f"{type(scheduler).__name__} paces a {type(paced).__name__} that is not set up; pass that "
                    "optimizer to lite.setup too, before its scheduler or together with it."
                )


def _live_engines() -> Iterator[tuple[nn.Module, Engine]]:
    for module, reference in list(_engines.items()):
        engine = reference()
        if engine is not None:
            yield module, engine


def _release(thing: Any) -> None:
    """Make one object the user's own again."""
    _owners.pop(thing, None)
    if isinstance(thing, nn.Module):
        unwrap_module(thing)
        engine = _engines.pop(thing, lambda: None)()
        if engine is not None:
            engine.close()
    elif isinstance(thing, Optimizer):
        unwrap_optimizer(thing)
        for handle in _hooks.pop(thing, []):
            handle.remove()
    elif isinstance(thing, LRScheduler):
        unwrap_scheduler(thing)
    else:
        from lite.data.loader import release_dataloader

        release_dataloader(thing)


def _check_tensors(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(t) for t in tensors):
        raise ConfigError(
            f"{type(model).__name__} has lazy parameters without a shape; run one forward with a real batch before "
            "setup."
        )
    if any(t.is_meta for t in tensors):
        from lite.deferred import check_deferred

        check_deferred(model)


def _misplaced(call: str, other: Any) -> str:
    """What to do with an argument that is neither an optimizer nor a scheduler."""
    if isinstance(other, (list, tuple)) and other and all(isinstance(o, (Optimizer, LRScheduler)) for o in other):
        kinds = ", ".join(type(o).__name__ for o in other)
        how = "model, *optimizers" if call == "setup" else "*optimizers"
        return f"{call} got the {type(other).__name__} [{kinds}] as one argument; unpack it with *: lite.{call}({how})."
    hint = "pass torch optimizers and schedulers"
    if isinstance(other, DataLoader):
        hint = "loaders go to lite.setup_dataloaders"
    elif isinstance(other, nn.Module):
        hint = "set each model up by its own call"
    return f"{call} got {shown(other)} among the optimizers and schedulers; {hint}."


def _post_hook(tell: AfterStep, strategy: Strategy) -> Callable[[Optimizer, Any, Any], None]:
    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tell(strategy, optimizer)

    return after_step
