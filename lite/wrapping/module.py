"""What `Lite.setup` hands back for a model: the user's own object, whose calls go through precision and strategy.

The object stays the same; only its class is exchanged for a subclass made for it alone, which holds everything in
closures. So `isinstance`, attributes, `state_dict` keys, `repr` and hooks are the raw model's, and there is no inner
copy to call by mistake. Copies and pickles are of the raw class. CONTRIBUTING.md has the reasons and what was measured
against it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

# Private in torch, and checked with 2.13: torch.compiler.disable would leave the user's forward to Python, too.
from torch._C._dynamo.eval_frame import set_eval_frame as _exchange_compiler

from lite.collectives import raise_explained
from lite.disguise import disguise
from lite.errors import ConfigError, UsageError
from lite.precision.base import Precision
from lite.strategies.base import Engine

_wrapped: weakref.WeakKeyDictionary[nn.Module, type[nn.Module]] = weakref.WeakKeyDictionary()


def wrap_module(module: nn.Module, *, engine: Engine | None, precision: Precision, device: torch.device) -> None:
    """Route the calls of `module` through `precision` and `engine`, in place.

    With neither an engine nor a precision that changes the forward, the module is left exactly as it is.

    Args:
        module: The user's model, converted and on its device.
        engine: What the strategy puts around a forward, or None.
        precision: What is done to inputs, computation and outputs.
        device: Where the model computes.

    Raises:
        ConfigError: The module's class can't be exchanged (its metaclass forbids it).
    """
    if engine is None and not precision.changes_forward:
        return
    raw = type(module)
    route = _Route(engine, precision, device)
    call = _routed_call(raw, route)
    if engine is None and route.autocast is not None:
        call = _autocast_call(raw, route, route.autocast)
    body: dict[str, Any] = {"__call__": call, "_apply": _guarded_apply(raw, precision, fixed=engine is not None)}
    whole = getattr(raw, "forward_methods", ("forward",))  # a class may name others that are a whole forward
    for name, method in own_methods(raw):
        named = name in whole and not (engine is not None and engine.through_call)
        body[name] = _routed_method(method, route, whole=named)
    body.update(engine.body if engine is not None else ())
    _disguise(module, body)
    _wrapped[module] = raw


def check_class(module: nn.Module) -> None:
    """Refuse a module whose class can't be exchanged, and leave it as it is.

    Raises:
        ConfigError: A subclass can't take the place of its class.
    """
    raw = type(module)
    _disguise(module, {})
    module.__class__ = raw


def _disguise(module: nn.Module, body: dict[str, Any]) -> None:
    try:
        disguise(module, body)
    except (TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{type(module).__name__} can't be set up: its class does not allow a subclass to take its place "
            f"({error}); set up the Python module that it was made from."
        ) from error


def unwrap_module(module: nn.Module) -> None:
    """Give the module its own class back."""
    raw = _wrapped.pop(module, None)
    if raw is not None:
        module.__class__ = raw


def own_methods(cls: type[nn.Module]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions of the user's classes, `forward` included, without those that torch.nn.Module has.

    A class may name others that compute nothing of their own, in `plain_methods`.
    """
    seen: set[str] = set(getattr(cls, "plain_methods", ()))
    for owner in cls.__mro__:
        if owner is nn.Module:
            break
        if owner.__module__.startswith("torch.distributed."):  # fully_shard puts a class of its own before the user's
            continue
        for name, value in vars(owner).items():
            if name in seen:
                continue
            seen.add(name)
            public = name == "forward" or (not name.startswith("_") and not hasattr(nn.Module, name))
            lazy = inspect.isgeneratorfunction(value) or inspect.iscoroutinefunction(value)
            if public and inspect.isfunction(value) and not lazy:
                yield name, value


class _Route:
    """The way of one model's calls; `inside` is true while one of them runs, so that calls from within go straight."""

    __slots__ = ("autocast", "device_type", "engine", "inside", "precision")

    def __init__(self, engine: Engine | None, precision: Precision, device: torch.device) -> None:
        self.engine = engine
        self.precision = precision
        self.device_type = device.type
        self.inside = False
        # One context serves every call: calls of one model don't nest on this way.
        self.autocast = precision.autocast() if precision.compute_dtype is not None else None

    def enter(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool) -> Any:
        """`run` where an engine stands around the model: torch.compile reaches what the user wrote alone."""
        compiler = _exchange_compiler(None)
        if compiler is None:
            return self.run(call, args, kwargs, whole)

        def compiled(*args: Any, **kwargs: Any) -> Any:
            _exchange_compiler(compiler)
            try:
                return call(*args, **kwargs)
            finally:
                _exchange_compiler(None)

        try:
            return self.run(compiled, args, kwargs, whole)
        finally:
            _exchange_compiler(compiler)

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool) -> Any:
        """Run `call(*args, **kwargs)`; `whole` says that it is the model's forward rather than another method."""
        self.inside = True
        try:
            if self.precision.changes_forward:
                return self._with_precision(call, args, kwargs, whole)
            engine = self.engine
            if engine is None:
                return call(*args, **kwargs)
            if torch.is_autocast_enabled(self.device_type):
                self.check_autocast()
            return engine.forward(call, args, kwargs) if whole else engine.method(call, args, kwargs)
        except RuntimeError as error:
            raise_explained(error)
            raise
        finally:
            self.inside = False

    def _with_precision(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool
    ) -> Any:
        precision, engine = self.precision, self.engine
        if torch.is_autocast_enabled(self.device_type):
            self.check_autocast()
        if precision.param_dtype is not None:
            args = tuple([precision.convert_input(a) for a in args])
            kwargs = {k: precision.convert_input(v) for k, v in kwargs.items()}
        if engine is None:
            return precision.convert_output(self._compute(call, args, kwargs))
        if whole:
            return precision.convert_output(self._compute(functools.partial(self._forward, call), args, kwargs))
        return engine.method(functools.partial(self._converted, call), args, kwargs)

    def _compute(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.autocast is None:
            return call(*args, **kwargs)
        with self.autocast:
            return call(*args, **kwargs)

    def _forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.engine is not None
        return self.engine.forward(call, args, kwargs)

    def _converted(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.precision.convert_output(self._compute(call, args, kwargs))

    def check_autocast(self) -> None:
        """A surrounding autocast must ask for the same as the precision does."""
        found = torch.get_autocast_dtype(self.device_type)
        if found != self.precision.compute_dtype:
            raise UsageError(
                f"the forward was called inside torch.autocast(dtype={found}), but the model was set up with "
                f"precision={self.precision.name!r}; leave autocast out, or create Lite with the precision that you "
                "want (precision='bf16-mixed' is autocast)."
            )


def _leave_to_python(function: Callable[..., Any]) -> None:
    """Let torch.compile not compile a function of its own accord, but what it calls."""
    from torch._dynamo.eval_frame import skip_code  # which torch's optimizers import anyway

    code: Any = function.__code__
    # A copy: functions of one definition share their code, and that of models without an engine is compiled.
    function.__code__ = code.replace()
    for part in (function, _Route.enter):
        skip_code(part.__code__)
    # What the compiler meets within a function that it compiles already, it calls as it is.
    _Route.enter._torchdynamo_disable = True  # type: ignore[attr-defined]


def _routed_call(raw: type[nn.Module], route: _Route) -> Callable[..., Any]:
    raw_call = raw.__call__

    run = route.run if route.engine is None else route.enter

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if route.inside:
            return raw_call(self, *args, **kwargs)
        return run(functools.partial(raw_call, self), args, kwargs, True)

    if route.engine is not None:
        _leave_to_python(__call__)
    return __call__


def _autocast_call(raw: type[nn.Module], route: _Route, autocast: AbstractContextManager[Any]) -> Callable[..., Any]:
    """`_routed_call` for autocast alone, the commonest case, with the same steps written out."""
    raw_call = raw.__call__
    precision, device_type = route.precision, route.device_type
    half = precision.compute_dtype

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if route.inside:
            return raw_call(self, *args, **kwargs)
        if torch.is_autocast_enabled(device_type):
            route.check_autocast()
        route.inside = True
        try:
            with autocast:
                outputs = raw_call(self, *args, **kwargs)
        finally:
            route.inside = False
        if type(outputs) is Tensor:
            return outputs.float() if outputs.dtype is half else outputs
        return precision.convert_output(outputs)

    return __call__


def _routed_method(method: Callable[..., Any], route: _Route, *, whole: bool) -> Callable[..., Any]:
    run = route.run if route.engine is None else route.enter

    @functools.wraps(method)
    def routed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if route.inside:
            return method(self, *args, **kwargs)
        return run(functools.partial(method, self), args, kwargs, whole)

    if route.engine is not None:
        _leave_to_python(routed)
    return routed


def _guarded_apply(raw: type[nn.Module], precision: Precision, *, fixed: bool) -> Callable[..., Any]:
    raw_apply = raw._apply

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        seen: set[tuple[torch.dtype, torch.device]] = set()
        for name, parameter in self.named_parameters(recurse=recurse):
            kind = (parameter.dtype, parameter.device)
            if kind in seen:
                continue
            seen.add(kind)
            probe = fn(parameter.detach().new_empty(0))
            if fixed and probe.device != parameter.device:
                raise UsageError(
                    f"moving a model that is set up for several processes from {parameter.device} to {probe.device} "
                    "would end the averaging of its gradients; call lite.teardown() first, or move a copy of its "
                    "state_dict."
                )
            wanted = probe.dtype
            if wanted != parameter.dtype:
                raise UsageError(
                    f"converting a model that is set up from {parameter.dtype} to {wanted} (at {name!r}) would leave "
                    f"its precision={precision.name!r}; create Lite with another precision, or call lite.teardown() "
                    "first."
                )
        return raw_apply(self, fn, recurse)  # type: ignore[no-untyped-call]

    return _apply
