"""Planning is pure: what comes out of which arguments, variables and devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lite import ConfigError, Lite
from lite.accelerators import CPUAccelerator, DeviceProbe
from lite.launchers import ElasticLauncher, InlineLauncher
from lite.plan import Plan, resolve
from lite.precision import MixedPrecision
from lite.strategies import DDPStrategy, SingleStrategy
from tests.support.processes import run_python

GPUS = DeviceProbe(cuda=4)
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1234",
}
ONE_GPU_EACH = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_JOB_ID": "7",
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


def test_names_are_read_in_any_case() -> None:
    """ "auto" too, from arguments and from variables."""
    assert type(plan(strategy="AUTO").strategy) is SingleStrategy
    assert type(plan({"LITE_STRATEGY": "Auto", "LITE_DEVICES": "AUTO"}, GPUS).strategy) is SingleStrategy
    assert plan(TORCHRUN, GPUS, devices="Auto", accelerator="GPU", strategy="DDP").devices == (0, 1)
    assert plan(probe=GPUS, devices=" 1, 3").devices == plan(probe=GPUS, devices="[1, 3]").devices == (1, 3)
    assert plan(probe=GPUS, devices="1,").devices == (1,)


def test_processes_that_each_see_one_device_use_it() -> None:
    """srun --gpus-per-task=1; under torchrun two processes on one GPU are a mistake."""
    probe = DeviceProbe(cuda=1)
    assert plan(ONE_GPU_EACH, probe).devices == plan(ONE_GPU_EACH, probe, devices=2).devices == (0, 0)
    assert plan(ONE_GPU_EACH, GPUS).devices == (0, 1)
    with pytest.raises(ConfigError, match="2 processes on this machine"):
        plan(TORCHRUN, probe)


def test_a_notebook_forks() -> None:
    """Unless the user asked for fresh processes, which is refused; with one process nothing is started."""
    for strategy in ("auto", "ddp", "ddp_notebook", DDPStrategy()):
        found = resolve({"devices": 2, "strategy": strategy}, {}, NOTHING, notebook=True)
        assert found.launcher.start_method == "fork"  # type: ignore[attr-defined]
    for strategy in ("ddp_spawn", DDPStrategy(start_method="forkserver")):
        with pytest.raises(ConfigError, match=r"strategy=.*ddp_notebook"):
            resolve({"devices": 2, "strategy": strategy}, {}, NOTHING, notebook=True)
        assert isinstance(resolve({"strategy": strategy}, {}, NOTHING, notebook=True).launcher, InlineLauncher)


NOTEBOOK = """
import sys, types
shell = types.ModuleType("IPython")
shell.get_ipython = lambda: None
sys.modules["IPython"] = shell
from lite import Lite
from lite.launchers import in_notebook
print(in_notebook())
shell.get_ipython = lambda: object()
lite = Lite(accelerator="cpu", devices=2)
print(in_notebook(), lite.launch(lambda lite: (lite.world_size, lite.all_reduce(1, "sum"))))
"""


def test_functions_of_a_notebook_run_in_forked_processes() -> None:
    """A lambda could reach no fresh process."""
    done = run_python("-c", NOTEBOOK)
    assert done.stdout.split("\n")[:2] == ["False", "True (2, 2)"], done.stderr


class OldGPU(CPUAccelerator):
    """A device that has no bfloat16."""

    def computes_in(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype is not torch.bfloat16


@pytest.mark.parametrize("name", ["bf16-mixed", "BF16", "bf16-True"])
def test_a_device_without_bfloat16_is_asked_when_it_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that has it; planning asks no device."""
    Lite(accelerator="cpu", precision=name)
    with pytest.raises(ConfigError, match=rf"precision='{name}': the GPU cpu .* nearest is '16-"):
        Lite(accelerator=OldGPU(), precision=name)
    monkeypatch.setenv("LITE_PRECISION", name)
    with pytest.raises(ConfigError, match=f"LITE_PRECISION={name}"):
        Lite(accelerator=OldGPU())
    Lite(accelerator=OldGPU(), precision="16-mixed")


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_in_any_case_and_planning_leaves_cuda_alone() -> None:
    """A process that has planned can still fork."""
    code = (
        "import torch; from lite import Lite; "
        "lite = Lite(devices=1, precision='BF16-mixed') if torch.cuda.is_bf16_supported() else None; "
        "print(lite.precision.name if lite else 'bf16-mixed')"
    )
    assert run_python("-c", code).stdout.strip() == "bf16-mixed"
    code = (
        "import torch; from lite.accelerators import probe_devices; probe_devices(); print(torch.cuda.is_initialized())"
    )
    assert run_python("-c", code).stdout.strip() == "False"


def test_an_installed_package_registers_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the entry-point group lite.strategies, as pip installs it."""
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lite.strategies]\nmine = mine_strategy:Mine\n")
    (tmp_path / "mine_strategy.py").write_text(
        "from lite.strategies import Strategy\nclass Mine(Strategy):\n    name = 'mine'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(Lite(accelerator="cpu", strategy="mine").strategy).__name__ == "Mine"
    with pytest.raises(ConfigError, match="'mine'"):
        Lite(accelerator="cpu", strategy="theirs")


def test_resolving_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping stays as it is, and the process's variables, modules and installed packages are not looked at."""
    environ, modules, process = dict(TORCHRUN), set(sys.modules), dict(os.environ)
    monkeypatch.setattr("importlib.metadata.entry_points", None)
    monkeypatch.setattr("lite.strategies.entry_points", None)
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setattr("torch.cuda.device_count", None)
    assert plan(environ, GPUS).settings == plan(environ, GPUS).settings
    assert plan(devices=2).world_size == 2
    assert (environ, set(sys.modules) - {"IPython"}, dict(os.environ)) == (TORCHRUN, modules - {"IPython"}, process)
