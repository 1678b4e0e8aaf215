"""The user's optimizer while DeepSpeed trains a model by it, from stage 1 on.

How DeepSpeed 0.19 behaves, and what follows from it:
- It lets the optimizer that it is given hold flat parts of its own. So it is given the user's optimizer seen through
  such groups, and the user's own goes on to hold the model's parameters.
- float32 weights are held twice in stages 1 and 2, and the second copy decides. It is renewed before each step, so that
  whatever was loaded or written into the model counts.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from lite.disguise import disguise
from lite.errors import UsageError
from lite.state import parameters_of
from lite.strategies.deepspeed_gradients import Gradients
from lite.strategies.deepspeed_state import Parts
from lite.strategies.deepspeed_wiring import NO_COPIES


class AdoptedOptimizer:
    """An optimizer that is changed in place until it is given back: its methods are those of here, its state is empty.

    Args:
        optimizer: The user's.
        gradients: Of the model that it trains.

    Attributes:
        view: The same optimizer as DeepSpeed gets it.
    """

    def __init__(self, optimizer: Optimizer, gradients: Gradients) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._raw: Any = type(optimizer)
        self._gradients = gradients
        self.view = _view_of(optimizer, self._raw)
        self._patched = optimizer.__dict__.pop("step", None)  # of a scheduler that was made before
        optimizer.state = defaultdict(dict)
        # DeepSpeed gets those groups alone of which something is trained.
        trained = [any(p.requires_grad for p in group["params"]) for group in optimizer.param_groups]
        self._numbers = [number for number, it_is in enumerate(trained) if it_is]
        self._engine: Any = None
        self._parts: Any = None

    def take_over(self, engine: Any, parts: Parts) -> None:
        """Let the optimizer step and save by DeepSpeed's engine, which has been made with `view`."""
        self._engine, self._parts = engine, parts
        optimizer = self._optimizer()
        assert optimizer is not None
        disguise(optimizer, self._body())

    def give_back(self) -> Optimizer | None:
        """Let the optimizer be of its class again, without a state.

        Returns:
            The optimizer; None where nobody has it any more.
        """
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.__class__ = self._raw
            if self._patched is not None:
                optimizer.__dict__["step"] = self._patched
        return optimizer

    def close(self) -> None:
        """Let go of DeepSpeed's engine."""
        self._engine = self.view = self._parts = None

    def _body(self) -> dict[str, Any]:
        mine, raw = self, self._raw

        def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            mine._step(self)
            return loss

        # Hooks run around all of it.
        hooked: Any = Optimizer.profile_hook_step(step)
        hooked.hooked = hooked._wrapped_by_lr_sched = True

        def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
            raw.zero_grad(self, set_to_none)
            mine._gradients.drop()

        def state_dict(self: Optimizer) -> Any:
            """All of the state, on the CPU. Collective: call on all ranks."""
            self.state = defaultdict(dict, mine._parts.whole_state())
            try:
                return raw.state_dict(self)
            finally:
                self.state = defaultdict(dict)

        def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
            before = self.param_groups  # torch makes new ones
            try:
                raw.load_state_dict(self, state_dict)
                mine._parts.take_state(self.state)
            except BaseException:
                self.param_groups = before
                raise
            finally:
                self.state = defaultdict(dict)

        def check_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
            numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
            held = parameters_of(self)
            if len(numbers) == len(held):  # torch refuses it otherwise
                state = state_dict["state"]
                mine._parts.check_state({p: state.get(n, {}) for n, p in zip(numbers, held, strict=True)})

        def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
            raise UsageError(
                f"{raw.__name__}.add_param_group after lite.setup: DeepSpeed has divided the optimizer's parameters by "
                "then; add it before, or call lite.teardown() and set up again."
            )

        return {
            "step": hooked,
            "zero_grad": zero_grad,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
            "check_state_dict": check_state_dict,
            "add_param_group": add_param_group,
            "state_is_local": True,
            **NO_COPIES,
        }

    def _step(self, optimizer: Optimizer) -> None:
        """Step on this rank's parts, and give all ranks the new weights. Collective: call on all ranks."""

        def step() -> None:
            self._engine.optimizer.refresh_fp32_params()
            groups = [optimizer.param_groups[i] for i in self._numbers]
            _copy_settings(groups, self.view.param_groups)
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.step()
            _copy_settings(self.view.param_groups, groups)

        if self._gradients.take_step(step) and self._engine.optimizer.overflow:
            warnings.warn(
                f"DeepSpeed has left out the step of {type(optimizer).__name__}: its gradients are inf or NaN. "
                "lite.clip_gradients(model, optimizer, max_norm=...) has a policy for them (nonfinite=).",
                stacklevel=4,
            )


def _view_of(optimizer: Optimizer, raw: Any) -> Any:
    """The same optimizer with groups and a state of its own, which DeepSpeed fills with flat tensors.

    Every other attribute is shared; what is frozen is left out.
    """
    unhooked: Any = raw.step
    if getattr(unhooked, "hooked", False):
        unhooked = unhooked.__wrapped__
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in optimizer.param_groups]
    own: dict[str, Any] = {"param_groups": [g for g in groups if g["params"]], "state": defaultdict(dict)}
    none: OrderedDict[int, Any] = OrderedDict()

    def kept(name: str) -> property:
        return property(lambda self: own[name], lambda self, value: own.__setitem__(name, value))

    view: Any = object.__new__(raw)
    view.__dict__ = optimizer.__dict__
    body = {
        "param_groups": kept("param_groups"),
        "state": kept("state"),
        "step": property(lambda self: unhooked.__get__(self)),
        "_optimizer_step_pre_hooks": property(lambda self: none),
        "_optimizer_step_post_hooks": property(lambda self: none),
    }
    disguise(view, body)
    return view


def _copy_settings(source: Iterable[dict[str, Any]], target: Iterable[dict[str, Any]]) -> None:
    """Learning rates and the like, between the groups of the user's optimizer and those of DeepSpeed's view of it."""
    for mine, theirs in zip(source, target, strict=True):
        theirs.update({key: value for key, value in mine.items() if key != "params"})
