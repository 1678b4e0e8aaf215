"""Two ways in which `setup` could hand a model back, measured and held against what users expect of their own model.

"disguise" exchanges the object's class for a subclass (what lite does); "proxy" is a module around the model that
passes unknown attributes through. Both do nothing but call the model, so that only the way itself is timed.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import arguments, compare, finish, interleave
from lite.disguise import disguise


class Model(nn.Module):
    """Has a method besides forward, and an attribute that a loop sets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def scaled(self, x: Tensor) -> Tensor:
        return self(x) * self.temperature


class Proxy(nn.Module):
    """A module around the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["calls"] += 1
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def by_disguise(module: nn.Module) -> tuple[nn.Module, Callable[[], int]]:
    calls = 0
    raw_call = type(module).__call__

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return raw_call(self, *args, **kwargs)

    disguise(module, {"__call__": __call__})
    return module, lambda: calls


def by_proxy(module: nn.Module) -> tuple[nn.Module, Callable[[], int]]:
    proxy = Proxy(module)
    return proxy, lambda: proxy.calls


def pickles_raw(model: nn.Module) -> bool:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return type(torch.load(stream, weights_only=False)) is Model


def laws(prepare: Callable[[nn.Module], tuple[nn.Module, Callable[[], int]]]) -> dict[str, bool]:
    model, calls = prepare(Model())
    model.temperature = 2.0
    before = calls()
    model.scaled(torch.ones(1, 4))
    seen = calls() > before
    return {
        "isinstance of the user's class": isinstance(model, Model),
        "a set attribute is seen by the model's methods": torch.equal(
            model.scaled(torch.ones(1, 4)), 2 * model(torch.ones(1, 4))
        ),
        "state_dict has the raw keys": list(model.state_dict()) == ["layer.weight", "layer.bias"],
        "a method's own call of the model goes the way": seen,
        "a deep copy is a raw model": type(copy.deepcopy(model)) is Model,
        "a pickle is of the raw model": pickles_raw(model),
    }


def main() -> None:
    options = arguments(__doc__, repeats=40, steps=2000)
    torch.set_num_threads(1)
    x = torch.ones(1, 4)
    models = {"raw": Model(), "disguise": by_disguise(Model())[0], "proxy": by_proxy(Model())[0]}

    def repeat(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for _ in range(options.steps):
                    model(x)

        return run

    times = interleave({name: repeat(model) for name, model in models.items()}, options.repeats, options.steps)
    rows = compare("forward of a 4 x 4 linear layer", times)
    held = {"disguise": laws(by_disguise), "proxy": laws(by_proxy)}
    print()
    for law in held["disguise"]:
        print(f"  {law:<50}" + "  ".join(f"{name}: {'yes' if held[name][law] else 'no':<4}" for name in held))
    finish([*rows, {"laws": held}], options.json)


if __name__ == "__main__":
    main()
