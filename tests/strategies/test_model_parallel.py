"""Tensor parallelism: data are counted once per group, and what can't be split is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from lite import ConfigError, Lite, ModelParallelStrategy
from lite.sharded import is_sharded
from lite.strategies.parallel_plan import matches
from tests.contracts.test_numbers import PLAN, SEQUENCE_PLAN
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

ROWWISE = RowwiseParallel()


def start(**arguments: Any) -> Lite:
    torch.manual_seed(3)
    strategy = ModelParallelStrategy(**{"parallelize": PLAN, **arguments})
    return Lite(accelerator="cpu", strategy=strategy)


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


# ---- data


def counting() -> dict[str, Any]:
    lite = start(tensor_parallel=2)
    loader = lite.setup_dataloaders(DataLoader(TensorDataset(torch.arange(7.0)), batch_size=2))
    batches, gathered = [], []
    with torch.no_grad():
        for (x,) in loader:
            batches.append(x.tolist())
            gathered.append(lite.gather_for_metrics(x))
    return {
        "batches": batches,
        "gathered": torch.cat(gathered).tolist(),
        "sum": lite.all_reduce(float(lite.strategy.data_shards(4, lite.global_rank)[1] + 1), "sum"),
        "everyone": lite.all_gather(torch.tensor(lite.global_rank)).tolist(),
    }


def test_loaders_and_metrics_go_by_the_data_axis() -> None:
    """Four ranks in two groups: both ranks of a group see the same samples, and count as one."""
    first, second, third, fourth = run_distributed(counting, world_size=4)
    assert first["batches"] == second["batches"] != third["batches"] == fourth["batches"]
    for facts in (first, second, third, fourth):
        assert facts["gathered"] == list(range(7))
        assert facts["sum"] == 3.0
        assert facts["everyone"] == [0, 1, 2, 3]


def logged() -> list[Any]:
    lite = start(parallelize=SEQUENCE_PLAN, loss_parallel=True)
    model = TinyGPT()
    lite.setup(model, optimizer := torch.optim.AdamW(model.parameters(), lr=0.01))
    (tokens,) = sentences(2)[:]
    logits = model(tokens[:, :-1])
    loss = next_token_loss(logits, tokens)
    lite.backward(loss)
    norm = lite.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    gathered = lite.gather_for_metrics(logits)
    return [lite.all_reduce(loss.detach()), gathered.shape, is_sharded(logits), is_sharded(gathered), norm.item()]


def test_sharded_losses_and_logits_are_put_together_for_logging() -> None:
    """all_reduce and gather_for_metrics give plain, whole tensors."""
    first, second = run_distributed(logged)
    for loss, shape, was_sharded, is_still, norm in (first, second):
        assert type(loss) is torch.Tensor
        assert shape == (2, 6, 16)
        assert was_sharded
        assert not is_still
        assert (loss, norm) == (first[0], first[4])


# ---- misuse


def odd_heads(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh["tensor"], PLAN)


def another(model: nn.Module, mesh: Any) -> nn.Module:
    return nn.Linear(2, 2)


def nothing(model: nn.Module, mesh: Any) -> None:
    """Splits none of it."""


def misuse() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    lite = start()
    model = TinyGPT(num_heads=1)
    facts["heads"] = told(lambda: lite.setup(model))
    lite = start(parallelize={**PLAN, "block.*.q": ColwiseParallel()})
    facts["typo"] = told(lambda: lite.setup(model))
    lite = start(parallelize=odd_heads)
    facts["heads by a function"] = told(lambda: lite.setup(model))
    lite = start(parallelize=another)
    facts["another model"] = told(lambda: lite.setup(model))
    lite = start(parallelize=nothing)
    facts["nothing"] = told(lambda: lite.setup(model))
    lite = start(parallelize={"blocks.*.q": ColwiseParallel(), "norm": ColwiseParallel()})
    facts["style"] = told(lambda: lite.setup(model))
    lite = start(parallelize={"head": RowwiseParallel(), "tokens": RowwiseParallel()})
    tied = TinyGPT(tied=True)
    facts["tied"] = told(lambda: lite.setup(tied))
    facts["still tied"] = tied.head.weight is tied.tokens.weight
    lite = start()
    good = TinyGPT()
    for option in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(good.parameters(), **{option: True})
        facts[option] = told(lambda optimizer=optimizer: lite.setup(good, optimizer))
    facts["as it was"] = all(type(p) is nn.Parameter for m in (model, good) for p in m.parameters()) and not any(
        part._forward_pre_hooks or part._forward_hooks for m in (model, good, tied) for part in m.modules()
    )
    facts["sizes"] = told(lambda: start(tensor_parallel=3))
    facts["both sizes"] = told(lambda: start(tensor_parallel=2, data_parallel=2))
    return facts


def test_misuse_is_refused_with_the_remedy() -> None:
    """And leaves the model as it was."""
    parts = {
        "heads": "tensor_parallel=2 does not divide the 1 heads of 'blocks.0' (num_heads=1)",
        "typo": "parallelize has the key 'block.*.q', which matches no layer of TinyGPT; did you mean 'blocks.*.q'?",
        "heads by a function": "tensor_parallel=2 does not divide the 1 heads",
        "another model": "returned another model",
        "nothing": "has split no parameter",
        "style": "parallelize['norm']=ColwiseParallel() is for Linear and Embedding layers, and 'norm' is a LayerNorm",
        "tied": "which are one parameter (tied weights), in different ways",
        "foreach": "leave foreach out",
        "fused": "leave fused out",
        "sizes": "tensor_parallel=3 but the job has 2 processes",
        "both sizes": "tensor_parallel=2 * data_parallel=2 but the job has 2 processes",
    }
    for facts in run_distributed(misuse):
        assert facts.pop("still tied")
        assert facts.pop("as it was")
        assert {k: v for k, v in facts.items() if parts[k] not in v} == {}
        assert facts.keys() == parts.keys()


def test_arguments_are_checked_before_any_process_starts() -> None:
    """What is wrong, and what to write instead."""
    for arguments, message in (
        ({"parallelize": {}}, "splits nothing"),
        ({"parallelize": {"head": "column"}}, "must be a torch.distributed.tensor.parallel.ParallelStyle"),
        ({"parallelize": 3}, "must be a dict of layer names and parallel styles, or a function"),
        ({"parallelize": PLAN, "tensor_parallel": 0}, "tensor_parallel=0 must be a whole number"),
    ):
        with pytest.raises(ConfigError) as caught:
            ModelParallelStrategy(**arguments)  # type: ignore[arg-type]
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="tensor_parallel=3 but the job has 4 processes"):
        Lite(accelerator="cpu", devices=4, strategy=ModelParallelStrategy(PLAN, tensor_parallel=3))


def test_patterns_match_name_by_name() -> None:
    """A star stands for one name, as in torch."""
    model = TinyGPT()
    assert list(matches(model, {"blocks.*.q": ROWWISE})) == ["blocks.0.q", "blocks.1.q"]
    assert list(matches(model, {"blocks.1.norm?": ROWWISE})) == ["blocks.1.norm1", "blocks.1.norm2"]
    with pytest.raises(ConfigError, match="matches no layer"):
        matches(model, {"*.q": ROWWISE})


def test_one_process_splits_nothing() -> None:
    """The same script runs on one."""
    lite = start()
    model = TinyGPT()
    assert lite.setup(model) is model
    assert type(model) is TinyGPT
    lite.backward(model(sentences(2)[:][0]).sum())
