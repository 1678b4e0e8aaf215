"""FSDP: still the user's model and optimizer; its traps are handled, or refused with what to do."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lite import ConfigError, FSDPStrategy, Lite, UsageError
from lite.sharded import is_sharded, local, whole
from lite.strategies.blocks import choose_blocks, find_blocks
from tests.support.models import MLP, Block, TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ConfigError, UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def start(strategy: Any = "fsdp", precision: str = "32-true") -> Lite:
    torch.manual_seed(3)
    return Lite(accelerator="cpu", strategy=strategy, precision=precision)


def step(lite: Lite, model: TinyGPT, optimizer: torch.optim.Optimizer) -> None:
    (tokens,) = sentences(2 * lite.world_size)[2 * lite.global_rank : 2 * lite.global_rank + 2]
    optimizer.zero_grad()
    lite.backward(next_token_loss(model(tokens[:, :-1]), tokens))
    optimizer.step()


# ---- still your model


def law_two() -> dict[str, Any]:
    lite = start()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lite").addHandler(handler)
    logging.getLogger("lite").setLevel(logging.INFO)
    raw = TinyGPT()
    keys, names = list(raw.state_dict()), [n for n, _ in raw.named_parameters()]
    blocks, first = raw.blocks, raw.blocks[0]
    model = lite.setup(raw)
    model.note = 5
    wanted = copy.deepcopy({k: whole(v) for k, v in model.state_dict().items()})
    with torch.no_grad():
        model(sentences(2)[:][0])
    # torch's fully_shard leaves the root's own parameters whole after that
    sharded = [is_sharded(p) for p in model.parameters()]
    facts = {
        "isinstance": isinstance(model, TinyGPT) and isinstance(model.blocks[0], Block),
        "same objects": model is raw and model.blocks is blocks and model.blocks[0] is first,
        "keys": list(model.state_dict()) == keys,
        "names": [n for n, _ in model.named_parameters()] == names,
        "all sharded": all(sharded),
        "bytes": sum(local(p).nbytes for p in model.parameters()),
        "loaded": str(model.load_state_dict(wanted)),
        "copy": told_any(lambda: copy.deepcopy(model)),
        "log": list(records),
        "explain": lite.explain().splitlines()[-1],
    }
    # A plain model's weights go in, and come out.
    other = TinyGPT()
    model.load_state_dict(other.state_dict())
    facts["loaded weights"] = all(torch.equal(whole(v), other.state_dict()[k]) for k, v in model.state_dict().items())
    wrong = {**other.state_dict(), "head.weight": torch.ones(3, 3)}
    facts["wrong"] = told_any(lambda: model.load_state_dict(wrong))
    lite.teardown()
    facts["torn down"] = type(model) is TinyGPT and type(model.blocks[0]) is Block and model.note == 5
    facts["raw"] = all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    copy.deepcopy(model)(sentences(2)[:][0]).sum().backward()
    lite.setup(model)  # and again
    lite.backward(model(sentences(2)[:][0]).sum())
    facts["twice"] = all(is_sharded(p.grad) for p in model.parameters())
    return facts


def told_any(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "nothing was raised"


def test_what_comes_back_is_the_users_model() -> None:
    """Class, parts, attributes, keys; sharded between steps; loads plain weights; plain after teardown, and again."""
    results = run_distributed(law_two)
    for facts in results:
        for law in ("isinstance", "same objects", "keys", "names", "all sharded", "loaded weights", "raw", "twice"):
            assert facts[law], law
        assert facts["torn down"]
        assert facts["loaded"] == "<All keys matched successfully>"
        assert "size mismatch for head.weight" in facts["wrong"]
        assert "this TinyGPT is sharded" in facts["copy"] and "lite.export" in facts["copy"]
        assert "2 Block (blocks.0 to blocks.1) and TinyGPT itself, over 2 ranks" in facts["explain"]
    total = sum(p.nbytes for p in TinyGPT().parameters())
    assert sum(facts["bytes"] for facts in results) == total
    assert [len(facts["log"]) for facts in results] == [1, 0]


def methods() -> dict[str, Any]:
    lite = start(precision="64-true")
    torch.manual_seed(3)
    raw = TinyGPT(torch.float64)
    model = lite.setup(TinyGPT(torch.float64))
    model.load_state_dict(raw.state_dict())
    (tokens,) = sentences(4)[2 * lite.global_rank : 2 * lite.global_rank + 2]
    facts: dict[str, Any] = {"count": model.count() == raw.count()}  # says nothing to the other rank
    if lite.global_rank == 0:
        model.count()
    for name, args in (("loss", (tokens,)), ("embed", (tokens,)), ("bare", ()), ("forward", (tokens,))):
        model.zero_grad()
        raw.zero_grad()
        output = getattr(model, name)(*args)
        lite.backward(output.pow(2).mean())
        everything = (sentences(4)[:][0],) if args else ()
        getattr(raw, name)(*everything).pow(2).mean().backward() if name != "loss" else None
        grads = {k: whole(p.grad) for k, p in model.named_parameters() if p.grad is not None}
        facts[name] = (output.detach(), grads)
        if name != "loss":
            for key, p in raw.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(grads[key], p.grad, rtol=0, atol=1e-12)
    return facts


def test_methods_of_the_model_work() -> None:
    """With and without tensors among their arguments; one that computes nothing may be called on one rank."""
    first, second = run_distributed(methods)
    assert first["count"]
    for name in ("loss", "embed", "bare", "forward"):
        assert first[name][1].keys() == second[name][1].keys() != set()


def state_dict_types(folder: Path) -> list[Any]:
    lite = start(FSDPStrategy(state_dict_type="full"))
    model = lite.setup(TinyGPT())
    full = model.state_dict()
    lite.save(folder / "full", {"model": model})
    lite.save(folder / "full.ckpt", {"model": model})
    model.load_state_dict(full)
    return [all(not is_sharded(v) for v in full.values()), full["head.weight"]]


def test_a_full_state_dict_is_whole_on_every_rank(tmp_path: Path) -> None:
    """And saves and loads as any other."""
    results = run_distributed(state_dict_types, tmp_path)
    assert all(plain for plain, _ in results)
    for path in (tmp_path / "full", tmp_path / "full.ckpt"):
        model = TinyGPT()
        Lite(accelerator="cpu").load(path, {"model": model})
        assert all(torch.equal(model.head.weight, weight) for _, weight in results)


# ---- optimizers


def optimizers() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    lite = start()
    model = TinyGPT()
    stepped = torch.optim.AdamW(model.parameters(), lr=0.01)
    next_token_loss(model(sentences(2)[:][0][:, :-1]), sentences(2)[:][0]).backward()
    stepped.step()  # before setup: its state moves along
    stepped.zero_grad()
    moments = [s["exp_avg"].clone() for s in stepped.state.values()]
    lite.setup(model, stepped)
    facts["moments"] = all(
        is_sharded(s["exp_avg"]) and torch.equal(whole(s["exp_avg"]), m)
        for s, m in zip(stepped.state.values(), moments, strict=True)
    )
    step(lite, model, stepped)
    facts["steps"] = {float(s["step"]) for s in stepped.state.values()}
    lite.teardown()
    facts["back"] = all(type(s["exp_avg"]) is torch.Tensor for s in stepped.state.values()) and {
        id(p) for p in stepped.state
    } == {id(p) for p in model.parameters()}
    # one that was made before, and is set up later
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    lite.setup_module(model)
    lite.setup_optimizers(late)
    before = whole(model.head.weight).clone()
    step(lite, model, late)
    facts["late"] = not torch.equal(whole(model.head.weight), before)
    strange = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    facts["strange"] = told(lambda: lite.setup_optimizers(strange))
    late.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    lite.backward(model(sentences(2)[:][0]).sum())
    facts["added"] = told(late.step)
    lite.teardown()
    model = TinyGPT()
    facts["lbfgs"] = told(lambda: lite.setup(model, torch.optim.LBFGS(model.parameters())))
    facts["untouched"] = type(model) is TinyGPT
    return facts


def test_optimizers_follow_the_parameters() -> None:
    """Made before setup, stepped before it, set up later; back with plain state at teardown; misfits are refused."""
    for facts in run_distributed(optimizers):
        assert facts["moments"]
        assert facts["steps"] == {2.0}
        assert facts["back"]
        assert facts["late"]
        assert facts["untouched"]
        assert "belong to no model that is set up" in facts["strange"]
        assert "came into being after lite.setup" in facts["added"]
        assert "use an optimizer that works element by element" in facts["lbfgs"]


def optimizers_of_equal_layers() -> list[bool]:
    lite = start()
    model = lite.setup(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))))
    ballast: list[Any] = []  # so that nothing lies where it does on the other rank
    optimizers = []
    for layer in model:
        ballast += [bytearray(37 * (len(ballast) + 1)) for _ in range(20 * lite.global_rank)]
        optimizers.append(lite.setup_optimizers(torch.optim.Adam(layer.parameters())))
    lite.backward(model(torch.ones(4, 8)).pow(2).mean())
    for optimizer in optimizers:
        optimizer.step()
    wanted = [whole(o.state[layer.weight]["exp_avg"]).clone() for layer, o in zip(model, optimizers, strict=True)]
    lite.teardown()
    found = [o.state[layer.weight]["exp_avg"] for layer, o in zip(model, optimizers, strict=True)]
    return [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)]


def test_several_optimizers_have_their_own_state_back_after_teardown() -> None:
    """Ranks put them together in one order, wherever they lie in memory."""
    assert run_distributed(optimizers_of_equal_layers) == [[True] * 6] * 2


def forwards_between(sharding: str) -> tuple[float, float]:
    """The loss after a step that a forward without a backward came before, and after a step alone."""
    losses = []
    for looks in (True, False):
        lite = start(FSDPStrategy(sharding=sharding))
        model = TinyGPT()
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        tokens = sentences(2)[:][0]
        lite.backward(next_token_loss(model(tokens[:, :-1]), tokens))
        if looks:
            model(tokens[:, :-1])
        optimizer.step()
        losses.append(next_token_loss(model(tokens[:, :-1]), tokens).item())
        lite.teardown()
    return losses[0], losses[1]


@pytest.mark.parametrize("sharding", ["full", "grad"])
def test_a_step_is_seen_by_the_next_forward_whatever_ran_before_it(sharding: str) -> None:
    """torch's fully_shard computes with the weights of before where a forward without a backward kept them whole."""
    for seen, wanted in run_distributed(forwards_between, sharding):
        assert seen == wanted


def inference_first(by_method: bool, on_meta: bool) -> tuple[float, float]:
    """The loss after a step, where the model's first use was within inference_mode, and where it was not."""
    losses = []
    for evaluates in (True, False):
        lite = start()
        with lite.init_module(empty_init="meta" if on_meta else None):
            model = TinyGPT()
        model = lite.setup(model)
        optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
        tokens = sentences(2)[:][0]
        if evaluates:
            with torch.inference_mode():
                (model.embed if by_method else model)(tokens[:, :-1])
        step(lite, model, optimizer)
        losses.append(next_token_loss(model(tokens[:, :-1]), tokens).item())
        lite.teardown()
    return losses[0], losses[1]


@pytest.mark.parametrize(("by_method", "on_meta"), [(False, False), (True, False), (False, True)])
def test_the_first_use_may_be_within_inference_mode(by_method: bool, on_meta: bool) -> None:
    """Weights that fully_shard puts together there could not be trained with."""
    for seen, wanted in run_distributed(inference_first, by_method, on_meta):
        assert seen == wanted


# ---- buffers, scalars, frozen weights


class WithBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def buffers(broadcast: bool) -> list[Any]:
    lite = start(FSDPStrategy(broadcast_buffers=broadcast))
    model = lite.setup(WithBatchNorm())
    for number in range(3):
        model(torch.full((4, 4), float(number + lite.global_rank)) + torch.arange(4.0)[:, None])
    with torch.no_grad():
        model(torch.ones(4, 4))
    model.eval()
    model(torch.ones(4, 4))
    model.train()
    model(torch.ones(4, 4))
    return [model.layers[1].running_mean.tolist()]


def test_batch_norms_statistics_are_rank_0s() -> None:
    """As under DDP; broadcast_buffers=False leaves each rank its own."""
    first, second = run_distributed(buffers, True)
    assert first == second
    first, second = run_distributed(buffers, False)
    assert first != second


def unfreezing() -> list[Any]:
    lite = start()
    model = TinyGPT()
    model.blocks[0].requires_grad_(False)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    for frozen in (True, False, True):
        model.blocks[0].requires_grad_(not frozen)
        before = [whole(p).clone() for p in model.blocks[0].parameters()]
        step(lite, model, optimizer)
        seen.append(all(torch.equal(whole(p), b) for p, b in zip(model.blocks[0].parameters(), before, strict=True)))
    return [seen, [whole(p).sum().item() for p in model.parameters()]]


def test_freezing_and_unfreezing_after_setup() -> None:
    """What is frozen stays; what is not moves, alike on all ranks."""
    first, second = run_distributed(unfreezing)
    assert first == second
    assert first[0] == [True, False, True]


# ---- misuse


def misuse() -> dict[str, str]:
    facts: dict[str, str] = {}
    lite = start()
    model: nn.Module = MLP()
    model.scale = nn.Parameter(torch.ones(()))
    facts["scalar"] = told(lambda: lite.setup(model))
    model = MLP()
    model.body[0].double()  # type: ignore[index, operator]
    facts["dtypes"] = told(lambda: lite.setup(model))
    model = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4))
    facts["sync"] = told(lambda: lite.setup(model))
    facts["sparse"] = told(lambda: lite.setup(nn.Sequential(nn.Embedding(4, 4, sparse=True), nn.Linear(4, 4))))
    model = MLP()
    facts["rprop"] = told(lambda: lite.setup(model, torch.optim.Rprop(model.parameters())))
    model = TinyGPT(tied=True)
    facts["list"] = told(lambda: lite.setup(model.blocks))
    model = lite.setup(TinyGPT())
    tokens = sentences(2)[:][0]
    (model_loss := model(tokens).sum())
    facts["stray"] = told(lambda: lite.backward(model_loss * nn.Parameter(torch.ones(()))))
    with lite.no_backward_sync(model):
        lite.backward(model(tokens).sum())
    facts["early clip"] = told(lambda: lite.clip_gradients(model, max_norm=1.0))
    facts["detached"] = told(lambda: lite.backward(model(tokens).sum().detach()))
    facts["autocast"] = told(lambda: autocast(model, tokens))
    facts["convert"] = told(model.double)
    loss = model(tokens).sum()
    lite.teardown()
    facts["after teardown"] = told(lambda: lite.backward(loss))
    lite = start(FSDPStrategy(auto_wrap={nn.LSTM}))
    facts["no match"] = told(lambda: lite.setup(TinyGPT()))
    lite = start(FSDPStrategy(auto_wrap={nn.Linear}))
    facts["tied"] = told(lambda: lite.setup(TinyGPT(tied=True)))
    lite = start(FSDPStrategy(auto_wrap={nn.Linear}))
    attention = lite.setup(nn.MultiheadAttention(4, 2))
    facts["inner layer"] = told(lambda: attention(*[torch.ones(3, 2, 4)] * 3))
    lite = start(FSDPStrategy(auto_wrap="Block"))
    facts["choice"] = told(lambda: lite.setup(TinyGPT()))
    lite = start(FSDPStrategy(activation_checkpointing="all"))
    facts["activation"] = told(lambda: lite.setup(TinyGPT()))
    for key, strategy in {
        "hybrid": FSDPStrategy(sharding="hybrid"),
        "replicas": FSDPStrategy(sharding="hybrid", replicate_axis=3),
        "all replicas": FSDPStrategy(sharding="hybrid", replicate_axis=2),
    }.items():
        facts[key] = told(lambda strategy=strategy: start(strategy))
    return facts


def autocast(model: nn.Module, tokens: torch.Tensor) -> None:
    with torch.autocast("cpu"):
        model(tokens)


def test_misuse_is_refused_with_the_remedy() -> None:
    """Before anything is changed, where that can be."""
    parts = {
        "scalar": "parameter 'scale' of this MLP is a scalar",
        "dtypes": "trains parameters of several dtypes, 'body.0.weight' (torch.float64)",
        "sync": "'1' is a SyncBatchNorm, which computes on GPUs alone",
        "sparse": "'0' of this Sequential has sparse=True, and FSDP can't reduce sparse gradients",
        "rprop": "Rprop chooses elements by their gradients' signs",
        "list": "ModuleList has no forward",
        "stray": "of no model that is set up",
        "early clip": "clip after the last backward of the window",
        "detached": "needs no gradient",
        "autocast": "inside torch.autocast",
        "convert": "from torch.float32 to torch.float64",
        "after teardown": "call backward before teardown",
        "no match": "auto_wrap={LSTM} matches nothing in TinyGPT, which is made of Block,",
        "tied": "also used outside of it (tied weights)",
        "inner layer": "keep the inner layer's class out of auto_wrap",
        "choice": "auto_wrap='Block' is not known",
        "activation": "activation_checkpointing='all' is not known",
        "hybrid": "sharding='hybrid' with one replica",
        "replicas": "replicate_axis=3 but the job has 2 processes",
        "all replicas": "leaves one rank for each replica",
    }
    for facts in run_distributed(misuse):
        assert {k: v for k, v in facts.items() if parts[k] not in v} == {}
        assert facts.keys() == parts.keys()


def test_arguments_are_checked_before_any_process_starts() -> None:
    """What is wrong, and what to write instead."""
    for arguments, message in (
        ({"sharding": "ful"}, "did you mean 'full'"),
        ({"replicate_axis": 2}, "which has no replicas"),
        ({"sharding": "hybrid", "replicate_axis": 0}, "replicate_axis=0 must be a whole number"),
        ({"sharding": "grad", "reshard_after_forward": True}, "keeps weights whole"),
        ({"state_dict_type": "local"}, "state_dict_type='local' is not known"),
        ({"timeout": 3}, "timeout=3 is not a timedelta"),
    ):
        with pytest.raises(ConfigError) as caught:
            FSDPStrategy(**arguments)  # type: ignore[arg-type]
        assert message.lower() in str(caught.value).lower()


# ---- what is wrapped


def test_the_repeated_layers_are_found() -> None:
    """Blocks in lists, ResNet-like stages, encoder and decoder; not single layers, not what shares weights."""
    transformer = nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=8, batch_first=True)
    assert list(find_blocks(transformer)) == [
        *(f"encoder.layers.{i}" for i in range(2)),
        *(f"decoder.layers.{i}" for i in range(3)),
    ]
    assert list(find_blocks(TinyGPT())) == ["blocks.0", "blocks.1"]
    assert find_blocks(MLP()) == {}
    model = TinyGPT()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    assert find_blocks(model) == {}
    assert list(choose_blocks(TinyGPT(), {Block}, "auto_wrap")) == ["blocks.0", "blocks.1"]
    assert list(choose_blocks(TinyGPT(), lambda m: isinstance(m, nn.Embedding), "auto_wrap")) == ["tokens"]


# ---- precision


def precision(name: str) -> dict[str, Any]:
    lite = start(precision=name)
    model = TinyGPT()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    seen: list[torch.dtype] = []
    model.blocks[0].up.register_forward_hook(lambda module, args, output: seen.append(module.weight.dtype))
    (tokens,) = sentences(2)[:]
    output = model(tokens[:, :-1])
    lite.backward(next_token_loss(output, tokens))
    grads = {p.grad.dtype for p in model.parameters()}
    optimizer.step()
    method = model.loss(tokens)
    states = {s["exp_avg"].dtype for s in optimizer.state.values()}
    params = {p.dtype for p in model.parameters()}
    facts = {"computed": seen[0], "output": output.dtype, "loss": method.dtype, "state": grads | states | params}
    lite.teardown()
    if "mixed" in name:
        facts["mixture"] = mixture(lite)
    return facts


class Mixture(nn.Module):
    """What 16-bit weights don't fit by themselves: norms, a float32 buffer, a softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten())
        self.register_buffer("position", torch.linspace(0, 1, 8))
        self.norms = nn.Sequential(nn.LayerNorm(8), nn.Unflatten(-1, (4, 2)), nn.GroupNorm(2, 4), nn.Flatten())
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.norms(self.first(x) + self.position)).float().softmax(-1))


def mixture(lite: Lite) -> tuple[float, float]:
    """A step on the same batch on all ranks, and how far it is from float32's."""
    torch.manual_seed(1)
    model, x = Mixture(), torch.randn(8, 1, 4)
    raw = copy.deepcopy(model)
    raw(x).pow(2).mean().backward()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = [whole(p).clone() for p in model.parameters()]
    lite.backward(model(x).pow(2).mean())
    optimizer.step()
    steps = torch.cat([(b - whole(p)).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    wanted = torch.cat([p.grad.flatten() for p in raw.parameters()])
    statistics = (raw.first[1].running_mean - model.first[1].running_mean).abs().max()
    lite.teardown()
    return (steps - wanted).norm().item() / wanted.norm().item(), statistics.item()


@pytest.mark.parametrize("name", ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_precision_strings(name: str) -> None:
    """Mixed precision computes in 16 bits over float32 parameters, gradients and state."""
    half = torch.bfloat16 if "bf16" in name else torch.float16
    computed = torch.float64 if "64" in name else torch.float32 if "32" in name else half
    kept = torch.float32 if "mixed" in name else computed
    for facts in run_distributed(precision, name):
        assert facts["computed"] == computed
        assert facts["state"] == {kept}
        assert facts["output"] == facts["loss"] == (torch.float64 if "64" in name else torch.float32)
        if "mixed" in name:  # bfloat16 keeps 8 bits
            assert facts["mixture"][0] < 2e-2 and facts["mixture"][1] < 2e-3


class Chosen(nn.Module):
    """Runs one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self.layers[number](x)


def skipping() -> str:
    """Each rank runs another layer, where collectives are compared."""
    os.environ["LITE_DEBUG"] = "1"
    try:
        lite = start()
        model = lite.setup(Chosen())
        lite.backward(model(torch.ones(1, 2), 0).sum())
        loss = model(torch.ones(1, 2), lite.global_rank).sum()
        return told(lambda: lite.backward(loss))
    finally:
        del os.environ["LITE_DEBUG"]
        torch.distributed.set_debug_level(torch.distributed.DebugLevel.OFF)


def test_lite_debug_notices_ranks_that_run_other_layers() -> None:
    """torch puts together what is of one shape, whatever it is."""
    for text in run_distributed(skipping):
        assert "rank 1 ran 'layers.1' where rank 0 ran 'layers.0'" in text


def smallest_and_largest() -> list[float]:
    lite = start(precision="64-true")
    model = nn.Sequential(nn.Linear(3, 1), nn.PReLU())
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.arange(6.0).reshape(2, 3)).sum())
    norms = [lite.clip_gradients(model, optimizer, max_norm=1e9, norm_type=p).item() for p in (float("inf"), 2.0)]
    largest = max(whole(p.grad).abs().max().item() for p in model.parameters())
    square = sum(whole(p.grad).pow(2).sum().item() for p in model.parameters())
    return [*norms, largest, square**0.5]


def test_norms_of_parameters_with_fewer_rows_than_ranks() -> None:
    """A rank has nothing of them."""
    for largest, norm, *wanted in run_distributed(smallest_and_largest):
        assert [largest, norm] == pytest.approx(wanted, rel=1e-12)


class Penalised(nn.Module):
    """Has a method that computes from weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)])
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))

    def penalty(self) -> Any:
        return sum(p.pow(2).sum() for p in self.parameters())


def penalised(strategy: str) -> dict[str, Any]:
    lite = start(strategy, "64-true")
    model, x = Penalised(), torch.arange(32.0, dtype=torch.float64).view(8, 4) / 32
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    refused, share = "", x.chunk(lite.world_size)[lite.global_rank]
    if lite.world_size > 1:
        refused = told(model.penalty)
    for _ in range(3):
        optimizer.zero_grad()
        lite.backward(model(share).pow(2).mean())
        together = [p.full_tensor() if is_sharded(p) else p for p in model.parameters()]
        sum(p.pow(2).sum() for p in together).mul(0.01).backward()
        optimizer.step()
    return {"refused": refused, "weights": [whole(p).tolist() for p in model.parameters()]}


def test_a_penalty_on_sharded_weights_is_told_how_to_be_computed() -> None:
    """And the remedy gives one process's weights, to float64's rounding."""
    one = penalised("auto")
    for rank in run_distributed(penalised, "fsdp"):
        assert "computed from sharded weights" in rank["refused"]
        assert "p.full_tensor().pow(2).sum() for p in model.parameters()).mul(0.01).backward()" in rank["refused"]
        for mine, wanted in zip(rank["weights"], one["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=0, atol=1e-12)


class Batch:
    """What a collate function of one's own returns, in which nobody sees a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Layer(nn.Sequential):
    """What is sharded by itself."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh())


class Layered(nn.Module):
    """A row of layers, with methods that have no tensor among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Any = nn.Linear(4, 4)
        self.blocks = nn.Sequential(Layer(), Layer())
        self.kept: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.blocks[0](self.first(x))
        return self.blocks[1](self.kept)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.blocks(self.first(batch.x)).pow(2).mean()

    def norm(self) -> float:
        return self.blocks[0][0].weight.detach().norm().item()  # type: ignore[index, union-attr]

    @torch.no_grad()
    def decided(self, x: torch.Tensor) -> float:
        weight = self.blocks[0][0].weight  # type: ignore[index, union-attr]
        return max(1.0, weight.abs().max()) if weight.mean() > 0 else float(weight.sum())

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield self.first(x)

    def scaled(self, x: torch.Tensor, norm: float) -> torch.Tensor:
        return self(x).pow(2).mean() * norm


class Deciding(Layered):
    """Its forward takes a number of a weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.norm()


class First(nn.Sequential):
    """A layer within one that is computed again in backward."""


def used_first(wrapped: type | None) -> list[float]:
    strategy = FSDPStrategy(auto_wrap={wrapped}, activation_checkpointing={First}) if wrapped else "auto"
    lite = start(strategy, "64-true")
    model, share = Layered(), torch.arange(32.0, dtype=torch.float64).view(8, 4)
    model.first = First(model.first)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model.loss(Batch(share.chunk(lite.world_size)[lite.global_rank]))
        lite.backward(loss)
        optimizer.step()
        losses.append(lite.all_reduce(loss.detach()).item())
    return losses


@pytest.mark.parametrize("wrapped", [Layer, nn.Linear])
def test_a_method_without_tensors_may_be_the_first_use(wrapped: type) -> None:
    """Whichever layer runs first, the model's own or a block, one process's losses come out."""
    one = used_first(None)
    for losses in run_distributed(used_first, wrapped):
        assert losses == pytest.approx(one, abs=1e-12)  # sums of 64-bit floats in another order


def reached_past_the_outputs(steps: int, wrapped: type | None) -> tuple[list[float], list[float]]:
    lite = start(FSDPStrategy(auto_wrap={wrapped}) if wrapped else "auto", "64-true")
    torch.manual_seed(2)
    model = Layered()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    features: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda layer, inputs, output: features.append(output))
    window, losses = lite.accumulate(model, steps=steps), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 4, dtype=torch.float64, generator=generator).chunk(lite.world_size)[lite.global_rank]
        with window():
            loss = model(x).pow(2).mean() + features.pop().pow(3).mean() + model.kept.abs().mean()
            lite.backward(loss)
        if window.ready:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(lite.all_reduce(loss.detach()).item())
    lite.teardown()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.parametrize("wrapped", [Layer, nn.Linear])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_loss_may_also_reach_weights_by_what_hooks_and_layers_keep(steps: int, wrapped: type) -> None:
    """Beside the outputs; losses and weights are one process's."""
    one = reached_past_the_outputs(steps, None)
    for found in run_distributed(reached_past_the_outputs, steps, wrapped):
        for mine, wanted in zip(found, one, strict=True):
            assert mine == pytest.approx(wanted, abs=1e-12)  # sums of 64-bit floats in another order


def past_the_model() -> dict[str, str]:
    lite = start(FSDPStrategy(auto_wrap={Layer}), "64-true")
    model, x = lite.setup(Layered()), torch.arange(8.0, dtype=torch.float64).view(2, 4)
    facts = {
        "layer": told(lambda: model.blocks(model.first(x))),
        "layer of keywords": told(lambda: model.first(input=x)),
        "generator": told(lambda: next(model.stream(x))),
        "number": told(model.norm),
        "decision": told(lambda: model.decided(x)),
    }
    whole_number = model.blocks[0][0].weight.full_tensor().norm().item()  # type: ignore[index, operator, union-attr]
    deciding = lite.setup(Deciding())
    facts["number in forward"] = told(lambda: deciding(x))
    facts["remedy"] = str(model.scaled(x, whole_number).item() > 0)
    # Outside of the model torch's own number is the part's.
    norm = model.blocks[0][0].weight.detach().norm()  # type: ignore[index, operator, union-attr]
    facts["part"] = str(norm.item() < whole_number)
    facts["documented"] = str(norm.full_tensor().item() == pytest.approx(whole_number, abs=1e-12))  # another order
    model.zero_grad()
    model(x)
    lite.backward(model.first.weight.pow(2).sum())  # between runs it is the rank's part, as an optimizer's
    facts["weight"] = str(torch.equal(whole(model.first.weight.grad), 2 * whole(model.first.weight)))
    model(x)
    facts["what is kept"] = told(lambda: lite.backward(model.kept.sum()))
    model(x)
    facts["method"] = told(lambda: lite.backward(model.loss(Batch(x))))
    lite.teardown()
    facts["after teardown"] = str(model.first(x).shape)
    lite = start(FSDPStrategy(auto_wrap={nn.Linear}), "64-true")
    model = lite.setup(model)
    facts["sharded weight"] = told(lambda: lite.backward(model(x).pow(2).mean() + model.first.weight.pow(2).sum()))
    lite.teardown()
    model = lite.setup(Layered().double())
    model.first(x)
    facts["layer first"] = told(lambda: model(x))
    return facts


def test_what_is_computed_past_a_sharded_model_is_refused_with_the_remedy() -> None:
    """Numbers of a rank's part, layers that are called outside of the model, and losses of its weights."""
    parts = {
        "number in forward": "UsageError: Deciding asked for the Python number",
        "number": "UsageError: Layered asked for the Python number",
        "decision": "from weight.full_tensor(), and pass it on",
        "layer": "UsageError: 'first', a layer of Layered, was called outside of Layered",
        "generator": "The body of a generator (a method with yield) runs when the method has returned already",
        "documented": "True",
        "layer of keywords": "'first', a layer of Layered, was called outside of Layered",
        "remedy": "True",
        "part": "True",
        "weight": "True",
        "what is kept": "Return what the loss needs (a hook's features, say)",
        "method": "nothing was raised",
        "after teardown": "torch.Size([2, 4])",
        "sharded weight": "depends on Layered's weights past what its forward and methods return",
        "layer first": "a layer of Layered was called outside of it before its own first call",
    }
    for facts in run_distributed(past_the_model):
        assert {k: v for k, v in facts.items() if parts[k] not in v} == {}
        assert facts.keys() == parts.keys()


def parametrized() -> bool:
    torch.manual_seed(3)
    raw = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh())
    expected = raw[0].weight.detach()
    lite = start()
    model = lite.setup(raw)
    for _ in range(2):  # before and after the first forward
        torch.testing.assert_close(whole(model[0].weight), expected)
        model(torch.ones(2, 4)).sum().backward()
    lite.teardown()
    return True


def test_a_parametrized_weight_is_read_outside_of_the_model() -> None:
    """A parametrization is a layer without inputs, which is called as its weight is read."""
    assert run_distributed(parametrized) == [True, True]


def parametrizations(name: str, precision: str = "bf16-mixed") -> tuple[list[float], list[Any]]:
    own = MixedPrecisionPolicy(torch.bfloat16, torch.float32)  # without autocast
    strategy = FSDPStrategy(mixed_precision=own) if name == "fsdp with a policy" else name
    kinds = nn.utils.parametrizations
    torch.manual_seed(3)
    raw = nn.Sequential(*(f(nn.Linear(4, 4)) for f in (kinds.orthogonal, kinds.spectral_norm, kinds.weight_norm)))
    lite = start(strategy, precision)
    model = lite.setup(raw)
    read = [whole(model[2].weight).tolist()]  # before the model runs
    optimizer = lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(lite.global_rank))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).float().pow(2).mean()
        lite.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    read.append(whole(model[2].weight).tolist())
    lite.teardown()
    return losses, read


def test_parametrizations_compute_in_float32_under_16_bit_precisions() -> None:
    """As under DDP, to the rounding of 16 bits: autocast leaves their own operations alone."""
    copied = run_distributed(parametrizations, "ddp")
    for case in (("fsdp",), ("fsdp with a policy", "32-true")):
        for mine, theirs in zip(run_distributed(parametrizations, *case), copied, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-2)
            torch.testing.assert_close(torch.tensor(mine[1]), torch.tensor(theirs[1]), rtol=0, atol=1e-2)


class TiedNorms(nn.Module):
    """Two norms with one weight, which is also used without them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.layer(self.first(x)) + x.float())
        return nn.functional.layer_norm(x, (8,), self.first.weight, self.first.bias)


class Float32Norm(nn.LayerNorm):
    """As CLIP's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).type_as(input)


class Float32Groups(nn.GroupNorm):
    """The same by the function."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.group_norm(input.float(), self.num_groups, self.weight, self.bias).type_as(input)


class Norms(nn.Module):
    """Norms in float32 of one's own, and torch's with a keyword."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.first, self.own, self.norm = nn.Linear(8, 8), own, nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(input=self.own(self.first(x)).float())


class Function(nn.Module):
    """A norm of which nobody can know that it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x.float(), (8,), self.scale)


def fails(norm: nn.Module, input: torch.Tensor) -> torch.Tensor:
    raise UsageError("a norm's own")


def float32_norms(precision: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    x = torch.arange(16.0).view(2, 8) / 16
    for name, own in {"layer": Float32Norm(8), "groups": Float32Groups(2, 8)}.items():
        for wrap in (None, {type(own)}):
            lite = start(FSDPStrategy(auto_wrap=wrap), precision)
            model = Norms(copy.deepcopy(own))
            raw = copy.deepcopy(model)
            before = [p.detach().clone() for p in model.parameters()]
            raw(x).pow(2).mean().backward()
            model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
            lite.backward(model(x).pow(2).mean())
            optimizer.step()
            key, forward = f"{name} {wrap is not None}", type(own).forward
            type(own).forward = fails
            facts[f"{key} failed"] = told(lambda model=model: model(x))  # type: ignore[misc]
            type(own).forward = forward
            lent = [p for p in model.own.parameters() if p.dtype == torch.float32 and not is_sharded(p)]
            with torch.no_grad():
                model(x)
            facts[f"{key} kept"] = not lent and all(map(is_sharded, model.own.parameters()))
            lite.teardown()
            assert (
                not model.own._forward_pre_hooks and not model.own._forward_hooks and not model.norm._forward_pre_hooks
            )
            pairs = list(zip(model.parameters(), before, raw.parameters(), strict=True))
            steps = torch.cat([(b - p.detach()).flatten() for p, b, _ in pairs])
            wanted = torch.cat([p.grad.flatten() for _, _, p in pairs])
            far = ((steps - wanted).norm() / wanted.norm()).item()
            facts[f"{name} {wrap is not None}"] = far
            facts[f"{name} {wrap is not None} dtype"] = model.own.weight.dtype
    lite = start(precision=precision)
    model = lite.setup(Norms(Function()))
    facts["function"] = told(lambda: model(x))
    return facts


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_norms_that_compute_in_float32_run_in_16_bits(precision: str) -> None:
    """Subclasses get their weights in float32, for the forward alone; a function's error says that it needs them."""
    for facts in run_distributed(float32_norms, precision):
        assert "F.layer_norm(x.float(), shape, weight.float(), bias.float())" in facts.pop("function")
        for name in ("layer", "groups"):
            for wrapped in (False, True):
                assert facts[f"{name} {wrapped} dtype"] == torch.float32
                assert facts[f"{name} {wrapped} kept"] and "a norm's own" in facts[f"{name} {wrapped} failed"]
                assert facts[f"{name} {wrapped}"] < 5e-2  # bfloat16 keeps 8 bits


def tied_norms(precision: str) -> list[bool]:
    lite = start(precision=precision)
    model = TiedNorms()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.arange(16.0).view(2, 8)).pow(2).mean())
    optimizer.step()
    kept = [model.first.weight is model.second.weight, model.first.weight.dtype == torch.float32]
    lite.teardown()
    return [*kept, not model.first._forward_pre_hooks]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_norms_that_share_a_weight_run_in_16_bits(precision: str) -> None:
    """Float32 inputs included; nothing of it stays after teardown."""
    assert run_distributed(tied_norms, precision) == [[True, True, True]] * 2
