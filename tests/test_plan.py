"""Planning is pure: what comes out of which arguments, variables and devices."""

from __future__ import annotations

from typing import Any

import pytest

from lite.accelerators import DeviceProbe
from lite.launchers import ElasticLauncher, InlineLauncher
from lite.plan import Plan, resolve
from lite.precision import MixedPrecision
from lite.strategies import DDPStrategy, SingleStrategy, Strategy

GPUS = DeviceProbe(cuda=4, cuda_bf16=True)
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1234",
}


NOTHING = DeviceProbe()


def plan(environ: dict[str, str] | None = None, probe: DeviceProbe = NOTHING, **arguments: Any) -> Plan:
    return resolve(arguments, environ or {}, probe)


def test_defaults_are_one_process_on_what_there_is() -> None:
    """CPU without a GPU, one GPU of several, Metal on a Mac."""
    assert (plan().accelerator.name, plan().world_size, type(plan().strategy)) == ("cpu", 1, SingleStrategy)
    assert (plan(probe=GPUS).accelerator.name, plan(probe=GPUS).devices) == ("cuda", (0,))
    assert plan(probe=DeviceProbe(mps=True)).accelerator.name == "mps"
    assert "of 4" in next(s.outcome for s in plan(probe=GPUS).settings if s.name == "devices")


def test_torchrun_alone_decides_the_number_of_processes() -> None:
    """One device per process, DDP, nothing to start."""
    joined = plan(TORCHRUN, GPUS)
    assert (joined.world_size, joined.devices, type(joined.strategy)) == (2, (0, 1), DDPStrategy)
    assert isinstance(joined.launcher, InlineLauncher)
    assert joined.started
    assert plan(TORCHRUN, GPUS, devices=[2, 3]).devices == (2, 3)
    assert plan(TORCHRUN, devices=2).world_size == 2


def test_several_devices_without_torchrun_are_started_by_the_launcher() -> None:
    """The launcher has as many processes as there are devices."""
    started = plan(accelerator="cpu", devices=3)
    assert isinstance(started.launcher, ElasticLauncher)
    assert (started.launcher.num_processes, started.world_size, started.started) == (3, 3, False)
    assert plan(probe=GPUS, devices=-1).devices == (0, 1, 2, 3)
    assert plan(probe=GPUS, devices="1,3").devices == (1, 3)
    assert plan(accelerator="cpu", devices=2, strategy="ddp_fork").launcher.start_method == "fork"  # type: ignore[attr-defined]


def test_argument_outranks_environment_outranks_default() -> None:
    """For each of the five variables."""
    environ = {
        "LITE_ACCELERATOR": "cpu",
        "LITE_DEVICES": "2",
        "LITE_PRECISION": "bf16",
        "LITE_STRATEGY": "ddp_find_unused_parameters_true",
        "LITE_NUM_NODES": "1",
    }
    from_environment = plan(environ, GPUS)
    assert (from_environment.accelerator.name, from_environment.world_size) == ("cpu", 2)
    assert from_environment.precision.name == "bf16-mixed"
    assert {s.source for s in from_environment.settings} == set(environ)
    argued = plan(environ, GPUS, precision="64-true", devices=1, strategy="auto", accelerator="gpu", num_nodes=1)
    assert (argued.accelerator.name, argued.world_size, argued.precision.name) == ("cuda", 1, "64-true")
    assert {s.source for s in argued.settings} == {"argument"}
    assert plan({"LITE_DEVICES": " "}).world_size == 1


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (64, "64-true"),
        (32, "32-true"),
        (16, "16-mixed"),
        ("bf16", "bf16-mixed"),
        ("BF16-True", "bf16-true"),
        ("16", "16-mixed"),
    ],
)
def test_precision_aliases(given: Any, name: str) -> None:
    """LightningLite's numbers and any case."""
    assert plan(precision=given).precision.name == name


def test_instances_pass_through() -> None:
    """A strategy, a precision plugin."""
    strategy = DDPStrategy(find_unused_parameters=True)
    assert plan(strategy=strategy).strategy is strategy
    precision = MixedPrecision("bf16-mixed", "cpu")
    assert resolve({}, {}, DeviceProbe(), [precision]).precision is precision


class Mine(Strategy):
    """A third party's."""

    name = "mine"


def test_an_installed_package_registers_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry-point group lite.strategies."""
    from importlib.metadata import EntryPoint

    point = EntryPoint(name="mine", value="tests.test_plan:Mine", group="lite.strategies")
    monkeypatch.setattr("lite.strategies.entry_points", lambda group: [point] if group == "lite.strategies" else [])
    assert type(plan(strategy="mine").strategy).__name__ == "Mine"


def test_resolving_changes_nothing() -> None:
    """Pure: the mapping that it reads stays as it is."""
    environ = dict(TORCHRUN)
    plan(environ)
    assert environ == TORCHRUN
