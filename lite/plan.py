"""Turns what the user asked for into objects: the only place where names, aliases and "auto" are settled.

`resolve` is pure: arguments, environment variables, the devices and strategies that were found go in, a frozen `Plan`
comes out. It starts nothing and every contradiction is a `ConfigError` that quotes the user's own words.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lite.accelerators import ACCELERATORS, Accelerator, DeviceProbe
from lite.accelerators.indices import read_request
from lite.environments import Environment, detect_environment
from lite.errors import ConfigError, choose
from lite.launchers import InlineLauncher, Launcher
from lite.precision import EXTRA_PRECISIONS, PRECISION_ALIASES, PRECISIONS, Precision, make_precision
from lite.strategies import STRATEGIES, Strategy

VARIABLES = {
    "accelerator": "LITE_ACCELERATOR",
    "strategy": "LITE_STRATEGY",
    "devices": "LITE_DEVICES",
    "num_nodes": "LITE_NUM_NODES",
    "precision": "LITE_PRECISION",
}
_PREFIX = "LITE_"
_OF_TRAINER = "LITE_TRAINER_"  # arguments of the Trainer, which looks at them by itself
DEBUG_VARIABLE = "LITE_DEBUG"
DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": "32-true",
}


class _DefaultStr(str):
    """A default that reads as a plain string in a signature and can be told from the same string passed by a user."""


class _DefaultInt(int):
    """The same for a number."""


AUTO = _DefaultStr("auto")
ONE_NODE = _DefaultInt(1)
FULL_PRECISION = _DefaultStr("32-true")


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the user passed."""
    return {k: v for k, v in arguments.items() if not isinstance(v, (_DefaultStr, _DefaultInt))}


@dataclass(frozen=True)
class Setting:
    """One setting as it was asked for.

    Args:
        name: The argument's name.
        value: What was asked for.
        source: "argument", "plugin", "default", or the environment variable's name.
        outcome: What it became, for `explain`.
    """

    name: str
    value: Any
    source: str
    outcome: str = ""

    def __str__(self) -> str:
        """As the user wrote it."""
        return f"{self.source}={self.value}" if self.source.startswith("LITE_") else f"{self.name}={self.value!r}"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before anything starts.

    Args:
        accelerator: The kind of device.
        devices: Local device indices; on the CPU one per process.
        num_nodes: Number of machines.
        world_size: Number of processes over all machines.
        strategy: How the processes work together.
        precision: Number formats.
        environment: Who this process is in the job.
        launcher: How the processes are started.
        settings: Every setting with its source, for `explain`.
    """

    accelerator: Accelerator
    devices: tuple[int, ...]
    num_nodes: int
    world_size: int
    strategy: Strategy
    precision: Precision
    environment: Environment
    launcher: Launcher
    settings: tuple[Setting, ...]

    @property
    def started(self) -> bool:
        """Whether the processes that the plan asks for are running already."""
        return self.environment.started or self.world_size == 1

    def joined(self, environment: Environment) -> Plan:
        """The plan as one of the started processes sees it."""
        return replace(self, environment=environment, launcher=InlineLauncher())


def resolve(
    arguments: Mapping[str, Any],
    environ: Mapping[str, str],
    probe: DeviceProbe,
    plugins: Any = None,
    *,
    strategies: Mapping[str, Callable[[], Strategy]] = STRATEGIES,
    notebook: bool = False,
) -> Plan:
    """Settle every setting.

    Args:
        arguments: What the user passed: any of accelerator, strategy, devices, num_nodes, precision. A setting that is
            left out comes from its `LITE_...` variable, or else from its default.
        environ: The environment variables.
        probe: The devices of this machine.
        plugins: A Precision or Environment object, or a list of them.
        strategies: What makes each strategy that has a name.
        notebook: Whether functions are defined in a notebook, so that only a fork can run them in other processes.

    Raises:
        ConfigError: A value is unknown, unavailable or contradicts another one.

    Warns:
        UserWarning: A variable has nearly the name of one that is known.
    """
    asked = {name: _setting(name, arguments, environ) for name in DEFAULTS}
    _warn_of_misspelt(environ)
    extra = _sort_plugins(plugins, asked)
    environment = extra.get("environment") or detect_environment(environ)
    environment.check()
    num_nodes = _num_nodes(asked["num_nodes"])
    accelerator = _accelerator(asked["accelerator"], probe)
    if environment.started:
        devices = _joined_devices(asked["devices"], asked["num_nodes"], accelerator, probe, environment)
        world_size, num_nodes = environment.world_size(), max(num_nodes, environment.num_nodes() or 1)
    else:
        if num_nodes > 1:
            raise ConfigError(
                f"{asked['num_nodes']} needs a launcher on every machine; start the script there with torchrun "
                f"--nnodes={num_nodes}, srun or mpirun."
            )
        devices = accelerator.devices(read_request(asked["devices"].value), probe, str(asked["devices"]))
        world_size = len(devices)
    strategy = _strategy(asked["strategy"], asked["devices"], world_size, environment, accelerator, strategies)
    strategy.check_world_size(world_size)
    precision = extra.get("precision") or _precision(asked["precision"], accelerator)
    if world_size > 1 and strategy.divides_models and not precision.divisible:
        raise ConfigError(
            f"precision={precision.name!r} with {asked['strategy']}: the layers that it makes can't be divided over "
            "ranks; use strategy='ddp', where each rank holds the whole model."
        )
    strategy.check_precision(precision)
    launcher = _launcher(strategy, asked["strategy"], world_size, environment, notebook)
    what_came = {
        "accelerator": accelerator.name,
        "strategy": f"{strategy.name}, {world_size} process{'es' if world_size > 1 else ''}",
        "devices": _describe(accelerator, devices, environment, probe),
        "num_nodes": str(num_nodes),
        "precision": precision.name,
    }
    if "precision" in extra:
        asked["precision"] = Setting("precision", extra["precision"], "plugin")
    settings = tuple(replace(setting, outcome=what_came[name]) for name, setting in asked.items())
    return Plan(accelerator, devices, num_nodes, world_size, strategy, precision, environment, launcher, settings)


def _setting(name: str, arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Setting:
    if name in arguments:
        return Setting(name, arguments[name], "argument")
    variable = VARIABLES[name]
    if environ.get(variable, "").strip():
        return Setting(name, environ[variable].strip(), variable)
    return Setting(name, DEFAULTS[name], "default")


def _warn_of_misspelt(environ: Mapping[str, str]) -> None:
    """A variable with nearly the name of one of ours would change nothing, without a word; others are not ours."""
    known = (*VARIABLES.values(), DEBUG_VARIABLE)
    bare = {name.removeprefix(_PREFIX): name for name in known}
    for name in environ:
        if name.upper().startswith(_PREFIX) and not name.upper().startswith(_OF_TRAINER) and name not in known:
            near = difflib.get_close_matches(name.upper().removeprefix(_PREFIX), bare, n=1)
            if near:
                warnings.warn(
                    f"{name}={environ[name]} is no variable of lite's, and changes nothing; did you mean "
                    f"{bare[near[0]]}?",
                    stacklevel=4,
                )


def _sort_plugins(plugins: Any, asked: Mapping[str, Setting]) -> dict[str, Any]:
    items = plugins if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    found: dict[str, Any] = {}
    for item in items:
        kind = "precision" if isinstance(item, Precision) else "environment" if isinstance(item, Environment) else None
        if kind is None:
            raise ConfigError(
                f"plugins={plugins!r}: {item!r} is no plugin; pass a Precision or an Environment object. Strategies "
                "and accelerators go into strategy= and accelerator=."
            )
        if kind in found:
            raise ConfigError(f"plugins={plugins!r} has two of the kind {kind}; pass one.")
        if kind in asked and asked[kind].source == "argument":
            raise ConfigError(f"{asked[kind]} and plugins={plugins!r} both set the {kind}; keep one of them.")
        found[kind] = item
    return found


def _num_nodes(setting: Setting) -> int:
    value = setting.value
    if setting.source.startswith("LITE_") and re.fullmatch("[0-9]+", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{setting} is not a number of machines; use a whole number of at least 1.")
    return value


def _accelerator(setting: Setting, probe: DeviceProbe) -> Accelerator:
    if isinstance(setting.value, Accelerator):
        accelerator = setting.value
    else:
        name = choose(*_name_value(setting), ["auto", "cpu", "cuda", "gpu", "mps"])
        if name == "gpu" and not probe.cuda and probe.mps:
            name = "mps"
        if name == "auto":
            name = "cuda" if probe.cuda else "mps" if probe.mps else "cpu"
        accelerator = ACCELERATORS["cuda" if name == "gpu" else name]()
    if not accelerator.is_available(probe):
        there = [n for n, kind in ACCELERATORS.items() if kind().is_available(probe)]
        raise ConfigError(
            f"{setting} is not available on this machine; it has {', '.join(there)}. Use accelerator='auto'."
        )
    return accelerator


def _joined_devices(
    devices: Setting, nodes: Setting, accelerator: Accelerator, probe: DeviceProbe, environment: Environment
) -> tuple[int, ...]:
    """The local devices when a scheduler or torchrun has started the processes; contradictions are errors."""
    world, local = environment.world_size(), environment.local_world_size()
    num_nodes = _num_nodes(nodes) if nodes.source != "default" else environment.num_nodes() or 1
    if nodes.source != "default" and environment.num_nodes() not in (None, num_nodes):
        raise ConfigError(f"{nodes} but {environment.name} runs on {environment.num_nodes()}; leave num_nodes out.")
    if local is None:
        if world % num_nodes:
            raise ConfigError(f"{nodes} does not divide the {world} processes that {environment.name} started.")
        local = world // num_nodes
    request, shown = read_request(devices.value), str(devices)
    if request in ("auto", -1):
        request, shown = local, f"{local} processes on this machine, one device each,"
    alone = accelerator.name != "cpu" and environment.binds_devices and len(accelerator.devices(-1, probe, shown)) == 1
    if alone and request == local:
        return (0,) * local  # each process sees its own device only; they compare them when they meet
    try:
        found = accelerator.devices(request, probe, shown)
    except ConfigError as error:
        if shown == str(devices):
            raise
        raise ConfigError(f"{error} Start fewer processes, or use accelerator='cpu'.") from None
    if len(found) != local:
        raise ConfigError(
            f"{devices} but {environment.name} started {local} process{'es' if local > 1 else ''}"
            f"{' on this machine' if num_nodes > 1 else ''}; use devices={local}, leave devices out, or start "
            f"{len(found)}{_how_many(environment, len(found))}."
        )
    return found


def _how_many(environment: Environment, count: int) -> str:
    return f", with torchrun --nproc-per-node={count}" if environment.name == "torchrun" else " processes"


def _strategy(
    setting: Setting,
    devices: Setting,
    world_size: int,
    environment: Environment,
    accelerator: Accelerator,
    strategies: Mapping[str, Callable[[], Strategy]],
) -> Strategy:
    if isinstance(setting.value, Strategy):
        strategy = setting.value
    elif _is_auto(setting.value):
        strategy = strategies["ddp" if world_size > 1 or environment.started else "single"]()
    else:
        name, value = _name_value(setting)
        if isinstance(value, str) and value.lower() == "dp":
            raise ConfigError(
                f"{setting}: DataParallel is not supported (slower than DDP, and other numbers); use 'ddp'."
            )
        strategy = strategies[choose(name, value, ["auto", *strategies])]()
    if world_size > 1 and not strategy.distributed:
        cause = f"{environment.name} started {world_size} processes" if environment.started else f"{devices}"
        raise ConfigError(
            f"{setting} but {cause}: each process would train a model of its own; use strategy='ddp', or one process."
        )
    if accelerator.name == "mps" and world_size > 1:
        raise ConfigError(f"{setting} can't run on accelerator='mps' with {world_size} processes; use one process.")
    return strategy


def _precision(setting: Setting, accelerator: Accelerator) -> Precision:
    if isinstance(setting.value, Precision):
        return setting.value
    name, value = _name_value(setting)
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        value = PRECISION_ALIASES.get(str(value).lower(), value)
    if value not in PRECISIONS:
        choose(name, setting.value, [*PRECISIONS, *EXTRA_PRECISIONS, *PRECISION_ALIASES])
        value = choose(name, value, [*PRECISIONS, *EXTRA_PRECISIONS])
    if accelerator.name == "mps" and value == "64-true":
        raise ConfigError(f"{setting} can't run on accelerator='mps', which has no float64; the nearest is '32-true'.")
    return make_precision(value, accelerator.name)


def _name_value(setting: Setting) -> tuple[str, Any]:
    return (setting.source if setting.source.startswith("LITE_") else setting.name), setting.value


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "auto"


def _launcher(
    strategy: Strategy, setting: Setting, world_size: int, environment: Environment, notebook: bool
) -> Launcher:
    if environment.started or world_size == 1:
        return InlineLauncher()
    method = strategy.start_method
    if notebook and method != "fork":
        asked_for = isinstance(setting.value, str) and setting.value.lower() == "ddp_spawn"
        if asked_for or method != "spawn":
            raise ConfigError(
                f"{setting} starts fresh processes, which can't see what a notebook defines; use "
                "strategy='ddp_notebook', leave strategy out, or move the code to a script."
            )
        method = "fork"
    from lite.launchers import ElasticLauncher

    return ElasticLauncher(world_size, start_method=method)


def check_device(plan: Plan, device: torch.device) -> None:
    """Refuse a precision that the device lacks; only the process that has the device can ask it.

    Raises:
        ConfigError: It is bfloat16, which GPUs before Ampere don't compute in.
    """
    dtypes = (plan.precision.param_dtype, plan.precision.compute_dtype)
    if torch.bfloat16 in dtypes and not plan.accelerator.computes_in(torch.bfloat16, device):
        setting = next(s for s in plan.settings if s.name == "precision")
        nearest = plan.precision.name.replace("bf16", "16")
        raise ConfigError(f"{setting}: the GPU {device} does not compute in bfloat16; the nearest is {nearest!r}.")


def _describe(accelerator: Accelerator, devices: Sequence[int], environment: Environment, probe: DeviceProbe) -> str:
    if accelerator.name == "cpu":
        text = f"{len(devices)} process{'es' if len(devices) > 1 else ''} on the CPU"
    else:
        text = ", ".join(f"{accelerator.name}:{i}" for i in devices)
        if accelerator.name == "cuda" and len(devices) < probe.cuda:
            text += f" of {probe.cuda} (devices=-1 or torchrun --nproc-per-node={probe.cuda} uses all)"
    return f"{text}, started by {environment.name}" if environment.started else text
