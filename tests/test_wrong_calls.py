"""Wrong calls end in an error that quotes what the user wrote and says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lite import CheckpointError, ConfigError, DDPStrategy, Lite, NonFiniteError, UsageError, seed_everything
from lite.accelerators import DeviceProbe
from lite.launchers import ElasticLauncher
from lite.loggers import CSVLogger
from lite.plan import resolve
from lite.precision import MixedPrecision
from tests.support.models import MLP, VAE
from tests.support.processes import run_distributed
from tests.test_plan import GPUS, ONE_GPU_EACH, TORCHRUN

ALONE = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
ARGUMENTS: list[tuple[dict[str, Any], dict[str, str], DeviceProbe, list[str]]] = [
    ({"accelerator": "cudda"}, {}, GPUS, ["accelerator='cudda'", "'cuda'"]),
    ({"accelerator": "gpu"}, {}, DeviceProbe(), ["accelerator='gpu'", "not available", "cpu"]),
    ({"accelerator": "mps"}, {}, GPUS, ["accelerator='mps'", "cuda"]),
    ({"accelerator": 3}, {}, GPUS, ["accelerator=3", "choose one of"]),
    ({"devices": 0}, {}, DeviceProbe(), ["devices=0", "devices=2"]),
    ({"devices": "0"}, {}, DeviceProbe(), ["devices='0'"]),
    ({"devices": "two"}, {}, GPUS, ["devices='two'", "4 CUDA devices"]),
    ({"devices": [0, 0]}, {}, GPUS, ["devices=[0, 0]", "twice"]),
    ({"devices": [5]}, {}, GPUS, ["devices=[5]", "isn't there"]),
    ({"devices": 5}, {}, GPUS, ["devices=5", "4 CUDA devices"]),
    ({"devices": []}, {}, GPUS, ["devices=[]"]),
    ({"devices": [0, 1]}, {}, DeviceProbe(), ["devices=[0, 1]", "number of processes"]),
    ({"devices": True}, {}, DeviceProbe(), ["devices=True"]),
    ({"num_nodes": 0}, {}, DeviceProbe(), ["num_nodes=0", "at least 1"]),
    ({"num_nodes": 2}, {}, DeviceProbe(), ["num_nodes=2", "torchrun --nnodes=2"]),
    ({"strategy": "dpp"}, {}, DeviceProbe(), ["strategy='dpp'", "Did you mean 'ddp'"]),
    ({"strategy": "dp"}, {}, DeviceProbe(), ["strategy='dp'", "use 'ddp'"]),
    ({"strategy": "single", "devices": 2}, {}, DeviceProbe(), ["strategy='single'", "devices=2", "strategy='ddp'"]),
    ({"strategy": "single"}, TORCHRUN, DeviceProbe(), ["strategy='single'", "torchrun started 2", "model of its own"]),
    ({"precision": "b16"}, {}, DeviceProbe(), ["precision='b16'", "Did you mean 'bf16'"]),
    ({"precision": 8}, {}, DeviceProbe(), ["precision=8", "32-true"]),
    ({"precision": "64-true"}, {}, DeviceProbe(mps=True), ["precision='64-true'", "'32-true'"]),
    ({"devices": 4}, TORCHRUN, DeviceProbe(), ["devices=4", "torchrun started 2", "--nproc-per-node=4"]),
    ({"devices": [0]}, TORCHRUN, GPUS, ["devices=[0]", "torchrun started 2"]),
    ({"accelerator": "cuda"}, TORCHRUN, DeviceProbe(cuda=1), ["2 processes", "1 CUDA device", "accelerator='cpu'"]),
    ({}, {**TORCHRUN, "WORLD_SIZE": "two"}, DeviceProbe(), ["WORLD_SIZE='two'", "whole number"]),
    ({}, {"LITE_PRECISION": "half"}, DeviceProbe(), ["LITE_PRECISION='half'"]),
    ({}, {"LITE_DEVICES": "many"}, DeviceProbe(cuda=2), ["LITE_DEVICES=many"]),
    ({}, {"LITE_DEVICES": "--3"}, DeviceProbe(), ["LITE_DEVICES=--3", "number of processes"]),
    ({}, {"LITE_DEVICES": "²"}, DeviceProbe(cuda=2), ["LITE_DEVICES=²", "not understood"]),
    ({}, {"LITE_DEVICES": "0,9"}, DeviceProbe(cuda=2), ["LITE_DEVICES=0,9", "isn't there"]),
    ({}, {"LITE_DEVICES": "5"}, DeviceProbe(cuda=4), ["LITE_DEVICES=5", "asks for more"]),
    ({"devices": "²"}, {}, DeviceProbe(), ["devices='²'"]),
    ({"devices": -1}, {}, DeviceProbe(), ["devices=-1", "number of processes"]),
    ({"devices": "0,1"}, {}, DeviceProbe(), ["devices='0,1'", "number of processes"]),
    ({"devices": True}, {**TORCHRUN, **ALONE}, GPUS, ["devices=True"]),
    ({"devices": 3}, ONE_GPU_EACH, DeviceProbe(cuda=1), ["devices=3", "1 CUDA device"]),
    ({}, {"LITE_NUM_NODES": "x"}, DeviceProbe(), ["LITE_NUM_NODES=x"]),
    ({"strategy": "ddp", "devices": 2}, {}, DeviceProbe(mps=True), ["devices=2"]),
]


@pytest.mark.parametrize(("arguments", "environ", "probe", "parts"), ARGUMENTS)
def test_wrong_settings(
    arguments: dict[str, Any], environ: dict[str, str], probe: DeviceProbe, parts: list[str]
) -> None:
    """Found while planning, before anything starts."""
    with pytest.raises(ConfigError) as caught:
        resolve(arguments, environ, probe)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_misspelt_variables_are_warned_of() -> None:
    """Those that are known, and other software's that begin alike, are not."""
    for name, meant in (
        ("LITE_PRECISON", "LITE_PRECISION"),
        ("LITE_DEVICE", "LITE_DEVICES"),
        ("LITE_DBUG", "LITE_DEBUG"),
    ):
        with pytest.warns(UserWarning, match=f"^{name}=1 .* did you mean {meant}\\?$"):
            resolve({}, {name: "1"}, DeviceProbe())
    resolve({}, {"LITE_DEBUG": "1", "LITE_CACHE_DIR": "x", "ELITE_DEVICE": "2"}, DeviceProbe())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def lite(**arguments: Any) -> Lite:
    return Lite(accelerator="cpu", **arguments)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MLP()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def setup_twice() -> None:
    it, (model, _) = lite(), model_and_optimizer()
    it.setup(model)
    it.setup(model)


def optimizer_twice() -> None:
    it, (model, optimizer) = lite(), model_and_optimizer()
    it.setup(model, optimizer)
    it.setup_optimizers(optimizer)


def loader_twice() -> None:
    it, loader = lite(), DataLoader(range(3))
    it.setup_dataloaders(it.setup_dataloaders(loader))


def foreign_optimizer() -> None:
    lite().setup(MLP(), model_and_optimizer()[1])


def clip(**arguments: Any) -> Callable[[], Any]:
    def call() -> None:
        it, (model, optimizer) = lite(), model_and_optimizer()
        it.setup(model, optimizer)
        it.backward(model(torch.ones(2, 4)).sum() * arguments.pop("factor", 1.0))
        it.clip_gradients(model, optimizer, **arguments)

    return call


def clip_swapped() -> None:
    it, (model, optimizer) = lite(), model_and_optimizer()
    model, optimizer = it.setup(model, optimizer)
    it.clip_gradients(optimizer, model, max_norm=1.0)  # type: ignore[arg-type]


def optimizers_in_a_list() -> None:
    model, optimizer = model_and_optimizer()
    lite().setup(model, [optimizer])  # type: ignore[arg-type]


def scaled_step_without_backward() -> None:
    it, (model, optimizer) = lite(precision="16-mixed"), model_and_optimizer()
    it.setup(model, optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def scaled_backward_without_optimizer() -> None:
    it = lite(precision="16-mixed")
    it.backward(it.setup(MLP())(torch.ones(2, 4)).sum())


def second_model_unscaled() -> None:
    it = lite(precision="16-mixed")
    for backward in (it.backward, torch.Tensor.backward):
        model, optimizer = it.setup(*model_and_optimizer())
        backward(model(torch.ones(2, 4)).sum())
        optimizer.step()


def clip_of_another_model() -> None:
    it, (model, optimizer), (other, others) = lite(), model_and_optimizer(), model_and_optimizer()
    it.setup(model, optimizer)
    it.setup(other, others)
    it.clip_gradients(model, others, max_norm=1.0)


def clip_of_a_foreign_optimizer() -> None:
    it, (model, optimizer) = lite(), model_and_optimizer()
    it.setup(model)
    it.clip_gradients(model, optimizer, max_norm=1.0)


def gather_a_list_of(*parts: Any) -> Callable[[], Any]:
    def call() -> None:
        it = lite()
        for _ in it.setup_dataloaders(DataLoader(range(4), batch_size=4)):
            it.gather_for_metrics((torch.ones(4), list(parts)))

    return call


def lazy_model() -> None:
    lite().setup(nn.LazyLinear(2))


def meta_model() -> None:
    with torch.device("meta"):
        model = nn.ParameterList([nn.Parameter(torch.ones(2))])
    lite().setup(model)


def lbfgs_with_scale() -> None:
    model = MLP()
    lite(precision="16-mixed").setup(model, torch.optim.LBFGS(model.parameters()))


def mixed_weights() -> None:
    it = lite()
    model = it.setup(MLP())
    window = it.accumulate(model, steps=3)
    for weight in (2, None):
        with window(weight=weight):
            it.backward(model(torch.ones(2, 4)).sum())


def outside_of_a_window() -> None:
    it = lite()
    it.accumulate(it.setup(MLP()), steps=2).scaled(torch.ones(1))


def nested_windows() -> None:
    it = lite()
    first, second = it.setup(MLP()), it.setup(MLP())
    with it.accumulate(first, steps=2)(), it.accumulate(second, steps=4)():
        pass


CALLS: list[tuple[Callable[[], Any], type[Exception], list[str]]] = [
    (setup_twice, UsageError, ["set up already", "teardown"]),
    (optimizer_twice, UsageError, ["SGD", "set up already"]),
    (loader_twice, UsageError, ["set up already"]),
    (foreign_optimizer, ConfigError, ["SGD holds 4 of 4 parameters", "model.parameters()"]),
    (lambda: lite().setup(3), ConfigError, ["setup got 3", "torch.nn.Module"]),
    (lambda: lite().setup(None), ConfigError, ["setup got None", "torch.nn.Module"]),  # type: ignore[arg-type]
    (lambda: lite().setup_module(MLP), ConfigError, ["setup_module got the class MLP"]),  # type: ignore[arg-type]
    (lambda: lite().setup(MLP(), 3), ConfigError, ["setup got 3", "torch optimizers"]),  # type: ignore[arg-type]
    (optimizers_in_a_list, ConfigError, ["the list [SGD]", "lite.setup(model, *optimizers)"]),
    (lambda: lite().setup_optimizers(3), ConfigError, ["setup_optimizers got 3"]),  # type: ignore[arg-type]
    *[
        (call, ConfigError, ["move_to_device='cpu'", "True or False", "accelerator="])
        for call in (
            lambda: lite().setup(MLP(), move_to_device="cpu"),  # type: ignore[arg-type]
            lambda: lite().setup_module(MLP(), move_to_device="cpu"),  # type: ignore[arg-type]
            lambda: lite().setup_dataloaders(DataLoader(range(2)), move_to_device="cpu"),  # type: ignore[arg-type]
        )
    ],
    (
        lambda: lite().setup_dataloaders(DataLoader(range(2)), shard="stride"),
        ConfigError,
        ["shard='stride'", "range has indices", "leave shard out"],
    ),
    (lambda: lite().setup(MLP(), DataLoader(range(2))), ConfigError, ["DataLoader", "setup_dataloaders"]),
    (lambda: lite().setup(MLP(), MLP()), ConfigError, ["MLP", "its own call"]),
    (lambda: lite().setup_optimizers(), ConfigError, ["no optimizer"]),
    (lambda: lite().setup_dataloaders(), ConfigError, ["no loader"]),
    (lambda: lite().setup_dataloaders([1, 2]), ConfigError, ["list", "DataLoader"]),
    (lambda: lite().setup_dataloaders([DataLoader(range(2))]), ConfigError, ["list of DataLoaders", "(*loaders)"]),
    (
        lambda: lite().setup_dataloaders(DataLoader(Stream()), shard="stride", use_distributed_sampler=False),
        ConfigError,
        ["shard='stride'", "use_distributed_sampler=False", "one of them"],
    ),
    (lambda: lite().setup_dataloaders(DataLoader(range(2)), shard="rank"), ConfigError, ["shard='rank'", "stride"]),
    (
        lambda: lite().setup_dataloaders(DataLoader(range(2)), use_distributed_sampler="x"),
        ConfigError,
        ["use_distributed_sampler='x'", "interleaved"],
    ),
    (lambda: lite(devices=2).setup(MLP()), UsageError, ["2 processes", "lite.launch(fn)", "--nproc-per-node=2"]),
    (lambda: lite(devices=2).device, UsageError, ["2 processes"]),
    (lambda: lite(devices=2).barrier(), UsageError, ["barrier"]),
    (lambda: lite(devices=2).launch(lambda it: 1), ConfigError, ["<lambda>", "top level"]),
    (lambda: lite(devices=2).launch(5), ConfigError, ["fn=5", "lite.launch(train)"]),
    (lambda: ElasticLauncher(2, "thread"), ConfigError, ["start_method='thread'", "spawn"]),
    (clip(), ConfigError, ["max_norm=None, clip_val=None"]),
    (clip(max_norm=1, clip_val=1), ConfigError, ["max_norm=1, clip_val=1"]),
    (clip(max_norm=-1), ConfigError, ["max_norm=-1"]),
    (clip(clip_val="a"), ConfigError, ["clip_val='a'"]),
    (clip(max_norm=1, nonfinite="drop"), ConfigError, ["nonfinite='drop'", "skip"]),
    (clip(max_norm=1, nonfinite="skip", error_if_nonfinite=True), ConfigError, ["same thing"]),
    (clip(max_norm=1, factor=float("inf")), NonFiniteError, ["gradient norm is", "nonfinite='skip'"]),
    (lambda: lite().clip_gradients(max_norm=1.0), ConfigError, ["neither a model nor an optimizer"]),
    (lambda: lite(precision="16-mixed").clip_gradients(MLP(), max_norm=1.0), ConfigError, ["optimizer=", "16-mixed"]),
    (scaled_step_without_backward, UsageError, ["lite.backward(loss)", "16-mixed"]),
    (scaled_backward_without_optimizer, UsageError, ["loss scale", "lite.setup(model, optimizer)"]),
    (second_model_unscaled, UsageError, ["lite.backward(loss)", "16-mixed"]),
    (clip_of_another_model, UsageError, ["MLP and a SGD that holds none of its parameters"]),
    (clip_of_a_foreign_optimizer, UsageError, ["SGD", "lite.setup has not prepared"]),
    *[
        (gather_a_list_of(*parts), UsageError, ["a list of 2", "4 samples", "into a tuple or a dict"])
        for parts in ((torch.ones(4), torch.ones(4)), (torch.ones(4), ("a", "b", "c", "d")))
    ],
    (lbfgs_with_scale, ConfigError, ["LBFGS", "bf16-mixed"]),
    (lazy_model, ConfigError, ["LazyLinear", "one forward"]),
    (meta_model, ConfigError, ["meta device", "reset_parameters()"]),
    (lambda: lite().no_backward_sync(MLP()), UsageError, ["MLP", "lite.setup"]),
    (lambda: lite().accumulate(MLP(), steps=2), UsageError, ["MLP", "lite.setup"]),
    (lambda: lite().accumulate(steps=2), ConfigError, ["no model"]),
    (mixed_weights, UsageError, ["weight"]),
    (outside_of_a_window, UsageError, ["scaled was called outside", "before backward"]),
    (nested_windows, UsageError, ["open already", "lite.accumulate(first, second"]),
    (lambda: lite().backward(torch.ones(3, requires_grad=True) * 2), UsageError, ["shape (3,)", "loss.mean()"]),
    (lambda: lite(devices=2).backward(torch.ones(1)), UsageError, ["backward", "lite.launch(fn)"]),
    (lambda: lite().backward(torch.ones(1), model=MLP()), UsageError, ["backward", "MLP"]),
    (lambda: lite().clip_gradients("x", max_norm=1.0), ConfigError, ["clip_gradients got 'x'", "torch.nn.Module"]),
    (lambda: lite().clip_gradients(MLP(), max_norm=1.0), UsageError, ["clip_gradients", "MLP", "lite.setup"]),
    *[(clip(max_norm=1, norm_type=p), ConfigError, [f"norm_type={p!r}", "inf"]) for p in ("x", 0, -2.0, float("nan"))],
    (clip_swapped, ConfigError, ["got the optimizer, SGD, as the model", "lite.clip_gradients(model, optimizer"]),
    (lambda: lite().all_reduce(torch.ones(2), op="median"), ConfigError, ["op='median'", "mean"]),
    (lambda: lite().broadcast(1, src=3), ConfigError, ["src=3", "1 ranks"]),
    (lambda: seed_everything(-1), ConfigError, ["seed=-1"]),
    (lambda: seed_everything("a"), ConfigError, ["seed='a'"]),  # type: ignore[arg-type]
    (lambda: lite().load("nowhere.ckpt"), CheckpointError, ["nowhere.ckpt", "does not exist"]),
    (lambda: lite().save("x.ckpt", [1]), ConfigError, ["state=list", "dict"]),  # type: ignore[arg-type]
    (lambda: lite().save("x.ckpt", {"f": {"g": open}}), CheckpointError, ["f.g", "state_dict"]),
    (lambda: lite().save("x.ckpt", {"m": 1}, {"n": bool}), ConfigError, ["filter has the key 'n'", "'m'"]),
    (lambda: lite().log("loss", torch.ones(2)), ConfigError, ["'loss'", "(2,)"]),
    (lambda: lite().log("loss", "high"), ConfigError, ["'loss'", "str"]),
    (lambda: lite().log("loss", 1, step="a"), ConfigError, ["step='a'", "step=100"]),  # type: ignore[arg-type]
    (lambda: lite().request_stop("late", after_s="x"), ConfigError, ["after_s='x'"]),  # type: ignore[arg-type]
    (lambda: lite().log(3, 1), ConfigError, ["the name 3", "log('loss', 0.5)"]),  # type: ignore[arg-type]
    (lambda: lite().log_dict(3), ConfigError, ["metrics=3", "dict"]),  # type: ignore[arg-type]
    (lambda: lite().log_hyperparameters(3), ConfigError, ["params=3", "vars(args)"]),  # type: ignore[arg-type]
    (lambda: lite().logger, UsageError, ["CSVLogger"]),
    (lambda: lite(loggers=3), ConfigError, ["loggers=3"]),
    (lambda: lite(callbacks="x"), ConfigError, ["callbacks='x'", "on_after_setup"]),
    (lambda: lite(callbacks=[print]), ConfigError, ["print", "no hooks"]),
    (lambda: lite(callbacks=[DataLoader]), ConfigError, ["DataLoader is a class", "DataLoader(...)"]),
    (lambda: lite(plugins="fast"), ConfigError, ["plugins='fast'", "Precision"]),
    (lambda: lite(plugins=[MixedPrecision("bf16-mixed", "cpu")] * 2), ConfigError, ["two of the kind precision"]),
    (
        lambda: lite(precision=32, plugins=MixedPrecision("bf16-mixed", "cpu")),
        ConfigError,
        ["precision=32", "both set"],
    ),
    (lambda: MixedPrecision("bf16-mixed", "cpu", torch.amp.GradScaler("cpu")), ConfigError, ["scaler=", "bf16"]),
    (lambda: DDPStrategy(comm_hook="fp8"), ConfigError, ["comm_hook='fp8'"]),
    (lambda: DDPStrategy(comm_hook=3), ConfigError, ["comm_hook=3", "'fp16'", "PowerSGD"]),  # type: ignore[arg-type]
    *[
        (lambda size=size: DDPStrategy(bucket_cap_mb=size), ConfigError, [f"bucket_cap_mb={size}", "at least 0"])
        for size in (-1, float("inf"), True)
    ],
    (lambda: DDPStrategy(process_group_backend="foo"), ConfigError, ["process_group_backend='foo'", "'gloo'"]),
    (lambda: DDPStrategy(process_group_backend="cpu:mpi"), ConfigError, ["='cpu:mpi'", "no 'mpi'", "'gloo'"]),
    (lambda: DDPStrategy(static_graph="x"), ConfigError, ["static_graph='x'", "True or False"]),  # type: ignore[arg-type]
    (lambda: DDPStrategy(timeout=3), ConfigError, ["timeout=3", "timedelta"]),  # type: ignore[arg-type]
    (lambda: CSVLogger("x", flush_every=0), ConfigError, ["flush_every=0"]),
]


@pytest.mark.parametrize(("call", "error", "parts"), CALLS)
def test_wrong_calls(call: Callable[[], Any], error: type[Exception], parts: list[str]) -> None:
    """At the call that is wrong, not at a later one."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def wrong_on_two_ranks() -> list[str]:
    it = Lite(accelerator="cpu")
    messages = []

    def collect(fn: Callable[[], Any]) -> None:
        try:
            fn()
            messages.append("nothing was raised")
        except (UsageError, ConfigError, CheckpointError) as error:
            messages.append(str(error))

    collect(lambda: it.all_reduce(torch.ones(2 + it.global_rank)))
    collect(lambda: it.all_gather(torch.ones(1, dtype=torch.float64 if it.global_rank else torch.float32)))
    collect(lambda: it.all_gather(torch.ones(2, 1 + it.global_rank)))
    collect(lambda: it.all_reduce({"a": 1.0} if it.global_rank else {"a": 1.0, "b": 2.0}))
    collect(lambda: it.gather_for_metrics(torch.ones(1) if it.global_rank else None))
    collect(lambda: it.all_reduce(torch.ones(1, dtype=torch.int16), "sum"))
    collect(lambda: it.broadcast((lambda: 1) if it.is_global_zero else None))
    collect(lambda: it.gather_for_metrics([lambda: 1] if it.global_rank else [1]))
    collect(lambda: it.save("/proc/nowhere/x.ckpt", {"model": VAE()}))

    def first() -> None:
        with it.rank_zero_first():
            if it.is_global_zero:
                raise ConfigError("the download failed")
            messages.append("entered")

    collect(first)
    return messages


def test_errors_on_several_ranks_are_known_to_all() -> None:
    """Mismatched shapes and dtypes, a failed save, a failed rank_zero_first block: nobody hangs, everybody is told."""
    for messages in run_distributed(wrong_on_two_ranks):
        assert "rank 0 has torch.float32 [2], rank 1 has torch.float32 [3]" in messages[0]
        assert "rank 1 has torch.float64" in messages[1]
        assert "after the first dimension" in messages[2]
        assert "rank 0 has {'a': value, 'b': value}, rank 1 has {'a': value}" in messages[3]
        assert "rank 0 has other, rank 1 has value" in messages[4]
        assert "torch.int16" in messages[5]
        assert "rank 0's object does not pickle" in messages[6]
        assert "rank 1's list does not pickle" in messages[7]
        assert "/proc/nowhere/x.ckpt" in messages[8]
        assert "the download failed" in messages[9]
        assert "entered" not in messages
