"""Pipelines: what the table of numbers and the matrix of checkpoints don't ask."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite import ConfigError, Lite, UsageError
from lite.elsewhere import fetch
from lite.precision.base import default_dtype
from lite.strategies.running_order import PipelinePlan, cut, running_order
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

LAYERS = ["tokens", "blocks", "norm", "head"]


def batch(number: int, size: int = 4) -> Tensor:
    (tokens,) = sentences(16)[4 * number : 4 * number + size]
    return tokens


def normed() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))).double()


def train(schedule: str, stages: Any = None) -> dict[str, Tensor]:
    """Two batches, of which the second has other shapes and trains a layer that was frozen in the first."""
    lite = Lite(accelerator="cpu", strategy="pipeline", precision="64-true")
    torch.manual_seed(3)
    with lite.init_module(empty_init="meta" if stages else None):
        model = TinyGPT(torch.float64)
    model.blocks[0].requires_grad_(False)
    options: dict[str, Any] = {"microbatches": 2, "schedule": schedule, "stages": stages, "layers": LAYERS}
    pipeline = lite.setup_pipeline(model, loss=next_token_loss, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lite.setup_optimizers(optimizer)
    losses = []
    for number, length in enumerate((7, 5, 7)):
        tokens = batch(number)[:, :length]
        losses.append(pipeline.forward_backward(tokens[:, :-1], target=tokens))
        lite.clip_gradients(model, optimizer, max_norm=0.5, norm_type=(2.0, 1.0, float("inf"))[number])
        optimizer.step()
        optimizer.zero_grad()
        model.blocks[0].requires_grad_(True)
    lite.check_sync()
    told = {"losses": torch.stack(losses), "outputs": pipeline(batch(3, 3))}
    lite.teardown()
    assert set(optimizer.state) == set(model.parameters())
    return {**told, **{k: v.clone() for k, v in model.state_dict().items()}}


def train_raw() -> dict[str, Tensor]:
    torch.manual_seed(3)
    with default_dtype(torch.float64):
        model = TinyGPT(torch.float64)
    model.blocks[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number, length in enumerate((7, 5, 7)):
        tokens = batch(number)[:, :length]
        loss = next_token_loss(model(tokens[:, :-1]), tokens)
        loss.backward()
        losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5, (2.0, 1.0, float("inf"))[number])
        optimizer.step()
        optimizer.zero_grad()
        model.blocks[0].requires_grad_(True)
    with torch.no_grad():
        return {"losses": torch.stack(losses), "outputs": model(batch(3, 3)), **model.state_dict()}


def with_buffers() -> tuple[list[Tensor], dict[str, Tensor]]:
    """A Sequential whose statistics change with each microbatch."""
    lite = Lite(accelerator="cpu", strategy="pipeline", precision="64-true")
    model = normed()
    raw = copy.deepcopy(model)
    pipeline = lite.setup_pipeline(model, loss=F.mse_loss, microbatches=2)
    torch.manual_seed(6)
    x, y = torch.randn(4, 4), torch.randn(4, 3).double()
    losses = [pipeline.forward_backward(x, target=y) for _ in range(2)]
    wanted = [torch.stack([F.mse_loss(raw(x[:2].double()), y[:2]), F.mse_loss(raw(x[2:].double()), y[2:])]).mean()]
    wanted += [torch.stack([F.mse_loss(raw(x[:2].double()), y[:2]), F.mse_loss(raw(x[2:].double()), y[2:])]).mean()]
    state = fetch(model.state_dict(), lite.device, to_all=True) if lite.world_size > 1 else model.state_dict()
    assert list(state) == list(raw.state_dict())
    for key, value in raw.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-10)
    torch.testing.assert_close(losses, [w.detach() for w in wanted], rtol=0, atol=1e-10)
    lite.teardown()
    return losses, {k: v.clone() for k, v in model.state_dict().items()}


def refusals() -> list[str]:
    lite = Lite(accelerator="cpu", strategy="pipeline")
    model = TinyGPT()
    told = []

    def note(call: Any, *args: Any, kind: type[Exception] = ConfigError, **kwargs: Any) -> None:
        with pytest.raises(kind) as caught:
            call(*args, **kwargs)
        told.append(str(caught.value))

    options: dict[str, Any] = {"loss": next_token_loss, "microbatches": 2, "layers": LAYERS}
    note(lite.setup, model)
    note(lite.setup_pipeline, model, **{**options, "stages": 3, "microbatches": 3})
    note(lite.setup_pipeline, model, torch.optim.LBFGS(model.parameters()), **options)
    note(lite.setup, model)  # its plan is forgotten
    assert not any(p.is_meta for p in model.parameters())  # what is refused stays as it was
    pipeline = lite.setup_pipeline(model, **options)
    assert model.count() == TinyGPT().count()
    assert sum(p.numel() for p in model.parameters() if not p.is_meta) < model.count()
    tokens = batch(0)
    note(model, tokens, kind=UsageError)
    note(model.loss, tokens, kind=UsageError)
    note(pipeline.forward_backward, tokens[:3, :-1], target=tokens[:3])
    note(pipeline.forward_backward, tokens[:2, :-1], target=tokens)
    note(lite.backward, torch.ones((), requires_grad=True), kind=UsageError)
    lite.teardown()
    note(pipeline.forward_backward, tokens[:, :-1], target=tokens, kind=UsageError)
    return told


def copies() -> list[str]:
    """What a file or a copy would have without the other ranks' layers; after teardown there is nothing to refuse."""
    lite = Lite(accelerator="cpu", strategy="pipeline", precision="64-true")
    model = normed()
    optimizer = torch.optim.AdamW(model.parameters())
    pipeline, _ = lite.setup_pipeline(model, optimizer, loss=F.mse_loss, microbatches=2)
    pipeline.forward_backward(torch.ones(4, 4), target=torch.zeros(4, 3).double())
    optimizer.step()
    states = model.state_dict(), optimizer.state_dict()
    told = []
    for call in (lambda it: torch.save(it, io.BytesIO()), pickle.dumps, copy.deepcopy):
        for it in (model, optimizer, *states):
            if call is copy.deepcopy and it in states:
                continue
            with pytest.raises(UsageError) as caught:
                call(it)
            told.append(str(caught.value))
    kept = copy.deepcopy(states)  # to go back to, within this run
    for part in model.parameters():
        part.data.zero_()
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    lite.teardown()
    assert type(optimizer) is torch.optim.AdamW
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    loaded, _ = torch.load(file, weights_only=False)
    both = zip(copy.deepcopy(model).state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) and not a.is_meta and a.any() for a, b in both)
    assert len(optimizer.state) == len(list(model.parameters()))
    return told


def under_ddp() -> str:
    lite = Lite(accelerator="cpu", strategy="ddp")
    with pytest.raises(ConfigError) as caught:
        lite.setup_pipeline(normed(), loss=F.mse_loss, microbatches=2)
    return str(caught.value)


def laws() -> tuple[Any, ...]:
    kinds = [("gpipe", None), ("interleaved_1f1b", ["blocks.0", "blocks.1", "norm"]), ("1f1b", ["norm"])]
    return [train(*kind) for kind in kinds], with_buffers(), refusals(), under_ddp(), copies()


def test_schedules_cuts_shapes_and_buffers() -> None:
    """Every schedule and cut computes what the raw model does, to 1e-10 in float64, also from meta; buffers see each
    microbatch once; and what a pipeline can't do, copies included, says what to do instead."""
    results = run_distributed(laws)
    wanted = train_raw()
    alone = with_buffers()
    for trained, buffered, told, ddp, of_copies in results:
        for found in trained:
            assert list(found) == list(wanted)
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, msg=key)
        torch.testing.assert_close(buffered, alone, rtol=0, atol=1e-10)
        remedies = [
            "lite.setup_pipeline(model",
            "start 3 processes",
            "AdamW",
            "lite.setup_pipeline(model",
            "pipeline(inputs)",
            "another rank",
        ]
        remedies += ["drop_last=True", "the same samples", "pipeline.forward_backward", "set it up again"]
        assert [remedy in text for remedy, text in zip(remedies, told, strict=True)] == [True] * len(told)
        assert "strategy='pipeline'" in ddp
        assert len(of_copies) == 10
        assert all("lite.save or lite.export" in text and "lite.teardown()" in text for text in of_copies)


def whole_copy(model: nn.Module, lite: Lite) -> dict[str, Tensor]:
    """The whole model's state on every rank, as it is now."""
    return {key: value.clone() for key, value in fetch(model.state_dict(), lite.device, to_all=True).items()}


def tied_over_ranks(folder: Path) -> dict[str, Tensor]:
    """Save and load a model of which one weight is on both ranks."""
    lite = Lite(accelerator="cpu", strategy="pipeline", precision="bf16-mixed")
    torch.manual_seed(3)
    model = TinyGPT(tied=True)
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"loss": next_token_loss, "microbatches": 2, "layers": LAYERS}
    pipeline, optimizer = lite.setup_pipeline(model, optimizer, **options)
    window = lite.accumulate(model, steps=2)
    for number in range(2):
        with window():
            pipeline.forward_backward(batch(number)[:, :-1], target=batch(number))
    ema = lite.ema(model, decay=0.5)
    optimizer.step()
    ema.update()
    state = {"model": model, "optimizer": optimizer, "ema": ema}
    lite.save(folder / "folder", state)
    lite.save(folder / "file.ckpt", state)
    lite.export(model, folder / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with ema.swap():
        swapped = whole_copy(model, lite)
    averages = lite.load(folder / "file.ckpt")["ema"]["averages"]
    assert [key for key in averages if not torch.equal(swapped[key], averages[key])] == []
    ema.update()
    lite.load(folder / "folder", state)
    with ema.swap():
        loaded = whole_copy(model, lite)
    assert all(torch.equal(loaded[key], averages[key]) for key in averages)
    after = whole_copy(model, lite)
    assert not torch.equal(after["tokens.weight"], torch.zeros(16, 8))
    assert torch.equal(after["tokens.weight"], after["head.weight"])
    return after


def test_a_checkpoint_of_a_tied_pipeline_is_the_whole_models(tmp_path: Path) -> None:
    """torch.load alone reads it, and safetensors have the raw keys; the ranks' copies of a tied weight stay equal."""
    safetensors = pytest.importorskip("safetensors.torch")
    results = run_distributed(tied_over_ranks, tmp_path)
    content = torch.load(tmp_path / "file.ckpt", weights_only=True)
    assert list(content["ema"]["averages"]) == [name for name, _ in TinyGPT(tied=True).named_parameters()]
    assert not torch.equal(content["ema"]["averages"]["norm.weight"], content["model"]["norm.weight"])
    assert len(content["optimizer"]["state"]) == len(list(TinyGPT(tied=True).parameters()))
    for found in results:
        assert list(found) == list(content["model"]) == list(TinyGPT(tied=True).state_dict())
        assert all(torch.equal(found[key], value) for key, value in content["model"].items())
    exported = safetensors.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(content["model"][key], value) for key, value in exported.items())


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"schedule": "1f1"}, "Did you mean '1f1b'?"),
        ({"microbatches": 0}, "at least 1"),
        ({"microbatches": True}, "whole number"),
        ({"microbatches": 1, "stages": 2}, "microbatches=2 or more"),
        ({"microbatches": 2, "stages": ["a", "b"]}, "microbatches=3 or more"),
        ({"stages": 0}, "a number of stages"),
        ({"layers": "tokens"}, "a list of the names"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], remedy: str) -> None:
    """As the user wrote them, on one process too."""
    plan = {"layers": None, "stages": None, "schedule": "1f1b", "microbatches": 4, **arguments}
    with pytest.raises(ConfigError, match=remedy.replace("?", r"\?")) as caught:
        PipelinePlan.checked(**plan)
    assert f"{next(iter(arguments))}={next(iter(arguments.values()))!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "schedule", "microbatches", "remedy"),
    [
        (3, "1f1b", 4, "as many; change stages, or start 3"),
        (4, "1f1b", 4, "interleaved_1f1b"),
        (2, "interleaved_1f1b", 4, "4 or more"),
        (["a"], "1f1b", 1, "microbatches=2 or more"),
        (4, "interleaved_1f1b", 5, "use 4"),
    ],
)
def test_stages_fit_the_ranks(stages: Any, schedule: str, microbatches: int, remedy: str) -> None:
    """For two processes, before a model is touched."""
    with pytest.raises(ConfigError, match=remedy):
        PipelinePlan.checked(None, stages, schedule, microbatches).num_stages(2)


def test_layers_are_found_and_balanced() -> None:
    """By names where the model is no Sequential; every tensor is in some layer; cuts follow the order."""
    model = TinyGPT()
    order = running_order(model, LAYERS)
    assert list(order) == ["tokens", "blocks.0", "blocks.1", "norm", "head"]
    assert cut(order, None, 2) == [["tokens", "blocks.0"], ["blocks.1", "norm", "head"]]
    assert cut(order, ["blocks", "norm"], 3) == [["tokens"], ["blocks.0", "blocks.1"], ["norm", "head"]]
    sizes = nn.Sequential(*[nn.Linear(n, 1, bias=False) for n in (5, 1, 1, 1, 5)])
    assert [len(part) for part in cut(running_order(sizes, None), None, 3)] == [1, 3, 1]
    for wrong, remedy in [
        (lambda: running_order(model, None), "layers=.'tokens', 'blocks'"),
        (lambda: running_order(model, ["tokens", "blocks", "norm"]), "'head.weight' of TinyGPT is in none"),
        (lambda: running_order(model, ["tokens", "block"]), "did you mean 'blocks'"),
        (lambda: running_order(model, [*LAYERS, "norm"]), "twice"),
        (lambda: cut(order, ["head", "norm"], 3), "in the order in which they run"),
        (lambda: cut(order, ["tokens"], 2), "after the first one"),
        (lambda: cut(order, ["heads"], 2), "Did you mean 'head'"),
        (lambda: cut(order, None, 6), "make no 6 stages"),
    ]:
        with pytest.raises(ConfigError, match=remedy):
            wrong()
