"""Tensor parallelism: data are counted once per group, and what can't be split is refused with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from lite import ConfigError, Lite, ModelParallelStrategy, UsageError
from lite.sharded import is_sharded, whole
from lite.strategies.numbers import _handlers
from lite.strategies.parallel_plan import matches
from lite.strategies.split_lengths import _check
from lite.trainer import LightningModule, Trainer
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
    except (ConfigError, UsageError) as error:
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


def evaluated() -> str:
    lite = start(parallelize=SEQUENCE_PLAN, loss_parallel=True)
    model = TinyGPT()
    wanted = model.loss(sentences(2)[:][0])
    lite.setup(model)
    trained = model.loss(sentences(2)[:][0])  # of split logits, by a method
    lite.backward(trained)
    torch.testing.assert_close(whole(trained.detach()), wanted.detach())
    with torch.no_grad():
        torch.testing.assert_close(whole(model.loss(sentences(2)[:][0])), wanted)
    with torch.inference_mode():
        return told(lambda: model.loss(sentences(2)[:][0]))


def test_a_loss_of_split_logits_says_what_to_evaluate_it_under() -> None:
    """torch 2.13 computes it under no_grad alone."""
    for text in run_distributed(evaluated):
        assert text.startswith("TinyGPT computed a loss within torch.inference_mode()")
        assert "use torch.no_grad(), or Trainer(inference_mode=False)" in text


class Generating(TinyGPT):
    """Uses logits for more than a loss."""

    @torch.no_grad()
    def append(self, tokens: torch.Tensor, full: bool) -> torch.Tensor:
        logits = self(tokens)
        logits = logits.full_tensor() if full else logits
        return torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)

    def mean(self, tokens: torch.Tensor) -> float:
        return self(tokens).mean().item()


def mixed_kinds(sequence: bool) -> dict[str, Any]:
    head = ColwiseParallel(use_local_output=False)
    lite = start(parallelize=SEQUENCE_PLAN if sequence else {**PLAN, "head": head}, loss_parallel=True)
    model, (tokens,) = Generating(), sentences(2)[:]
    kept: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda layer, inputs, output: kept.append(output))
    prompt = tokens[:, :4]
    logits = model(prompt)
    wanted = torch.cat([prompt, logits[:, -1].argmax(-1, keepdim=True)], 1)
    loss = next_token_loss(model(tokens[:, :-1]), tokens)
    (loss + kept[-1].pow(2).sum()).backward()
    gradient = model.tokens.weight.grad
    model.zero_grad()
    lite.setup(model)
    facts: dict[str, Any] = {"cat": told(lambda: model.append(prompt, full=False))}
    assert torch.equal(model.append(prompt, full=True), wanted)
    facts["item"] = told(lambda: model.mean(prompt))
    loss = next_token_loss(model(tokens[:, :-1]), tokens)
    facts["sum"] = told(lambda: lite.backward(loss + kept[-1].pow(2).sum()))
    model.zero_grad()
    loss = next_token_loss(model(tokens[:, :-1]), tokens)
    lite.backward(loss.full_tensor() + kept[-1].pow(2).sum())
    torch.testing.assert_close(whole(model.tokens.weight.grad), gradient)
    return facts


@pytest.mark.parametrize("sequence", [False, True])
def test_split_logits_among_plain_tensors_are_told_from_what_else_is_split(sequence: bool) -> None:
    """With `full_tensor()`, which gives one process's numbers."""
    for facts in run_distributed(mixed_kinds, sequence):
        cat = "The outputs of head stay split and marked as such, DTensors (use_local_output=False)"
        assert cat in facts["cat"] and "takes logits.full_tensor(), on all ranks." in facts["cat"]
        assert ("are split over the sequence" in facts["cat"]) == sequence
        assert "that stay split is that of outputs.full_tensor(), which all ranks must call" in facts["item"]
        assert facts["sum"].startswith("lite.backward got a loss that adds up a term of split logits, a DTensor")
        assert "loss.full_tensor() + penalty" in facts["sum"]


def loss_parallel_twice() -> Any:
    """Two jobs in one process, and a block of the user's own; the second goes on when the first has left."""
    losses = []
    strategies = []
    for _ in range(2):
        lite = start(parallelize=SEQUENCE_PLAN, loss_parallel=True)
        strategies.append(lite.strategy)
        losses.append(lite.setup(TinyGPT()).loss(sentences(2)[:][0]))
        lite.backward(losses[-1])
        lite.teardown()
    strategies[0]._contexts.close()
    within = torch.ops.aten._log_softmax.default in _handlers()
    with loss_parallel():
        pass
    strategies[1]._contexts.close()
    return [whole(loss.detach()).item() for loss in losses], within, torch.ops.aten._log_softmax.default in _handlers()


def test_several_jobs_of_one_process_share_loss_parallel() -> None:
    """torch's table is taken away once, by the last."""
    for (first, second), within, after in run_distributed(loss_parallel_twice):
        assert first == second
        assert within and not after


# ---- again


class Module(LightningModule):
    """Split over two ranks by each call of a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = row_of_layers(8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def again() -> Any:
    raw = row_of_layers(8)
    wanted = raw(torch.ones(2, 4))
    for model in (raw, raw, copy.deepcopy(raw)):
        lite = start(parallelize={"0": ColwiseParallel(), "2": RowwiseParallel()})
        lite.setup(model)
        torch.testing.assert_close(model(torch.ones(2, 4)), wanted)
        lite.teardown()
        assert not [key for part in model.modules() for key in vars(part) if "distribute" in key]
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
        torch.testing.assert_close(copy.deepcopy(model)(torch.ones(2, 4)), wanted)
    plan = {"net.0": ColwiseParallel(), "net.2": RowwiseParallel()}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", strategy=ModelParallelStrategy(plan), max_epochs=1, enable_model_summary=False, **options
    )
    module, loaders = Module(), [DataLoader(torch.ones(4, 4), batch_size=2) for _ in range(2)]
    trainer.fit(module, *loaders)
    first = trainer.validate(module, loaders[1], verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, *loaders)
    return [first, trainer.validate(module, loaders[1], verbose=False), trainer.global_step]


def test_a_model_is_split_again_after_teardown() -> None:
    """The same one, a copy of it, and by a Trainer that fits, validates and fits again."""
    for (first,), (second,), steps in run_distributed(again):
        assert 0 < second["val"] < first["val"]
        assert steps == 4


# ---- misuse


class Critic(nn.Sequential):
    """It computes its penalty itself."""

    def penalty(self, x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(self.forward(x).tanh().sum(), x, create_graph=True)
        return gradient.pow(2).sum()


def penalties() -> list[str]:
    """A gradient penalty through split layers, in a method, of one alone, not through any, and a step after that."""
    lite = start(parallelize={"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = lite.setup(Critic(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 1)))
    x = torch.ones(2, 4, requires_grad=True)
    hidden: list[torch.Tensor] = []
    model[3].register_forward_pre_hook(lambda layer, inputs: hidden.append(inputs[0]))

    def penalty(of: str) -> None:
        score = model(x).tanh().sum()
        (gradient,) = torch.autograd.grad(score, x if of == "input" else hidden[-1], create_graph=True)
        lite.backward(gradient.pow(2).sum())

    return [
        told(lambda: penalty("input")),
        told(lambda: model.penalty(x)),
        told(lambda: torch.autograd.grad(model[0](x).sum(), x, create_graph=True)),
        told(lambda: penalty("hidden")),
        told(lambda: lite.backward(model(x).sum())),
    ]


def test_a_gradient_penalty_through_split_layers_is_refused() -> None:
    """torch would leave its second-order part out."""
    for *through_split, through_others, plain in run_distributed(penalties):
        for text in through_split:
            assert "create_graph=True went through a layer that is split over the ranks" in text
        assert through_others == plain == "nothing was raised"


class Heads(nn.Module):
    """Reckons with a number of heads that it alone knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], 4, 2).tanh().flatten(1)


def row_of_layers(width: int, middle: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), middle or nn.Tanh(), nn.Linear(width, 2))


def odd_heads(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh["tensor"], PLAN)


def another(model: nn.Module, mesh: Any) -> nn.Module:
    return nn.Linear(2, 2)


def nothing(model: nn.Module, mesh: Any) -> None:
    """Splits none of it."""


def overlapping() -> list[Any]:
    whole = Replicate()
    plan = {"*": ColwiseParallel(output_layouts=whole), "1": RowwiseParallel(input_layouts=whole)}
    lite = start(parallelize=plan)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    x = torch.ones(2, 4)
    wanted = model(x)
    lite.setup(model)
    split = [model[0].weight.placements[0].dim, model[1].weight.placements[0].dim]
    torch.testing.assert_close(model(x), wanted)
    return split


def test_of_several_keys_that_match_a_layer_the_last_one_counts() -> None:
    """It is split once, as that one says."""
    assert run_distributed(overlapping) == [[0, 1]] * 2


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
    column, row, whole = ColwiseParallel(), RowwiseParallel(), Replicate()
    for name, plan in {"columns": {"0": column, "2": row}, "rows": {"2": row}}.items():
        lite = start(parallelize=plan)
        facts[name] = told(lambda lite=lite: lite.setup(row_of_layers(7)))
    lite = start(parallelize={"0": ColwiseParallel(output_layouts=whole), "2": RowwiseParallel(input_layouts=whole)})
    uneven = row_of_layers(7)
    wanted = uneven(torch.ones(2, 4))
    torch.testing.assert_close(lite.setup(uneven)(torch.ones(2, 4)), wanted)
    for name, part in {"batch norm": nn.BatchNorm1d(8), "constant": Heads()}.items():
        lite = start(parallelize={"0": column, "2": row})
        model = lite.setup(row_of_layers(8, part))
        facts[name] = told(lambda model=model: model(torch.ones(2, 4)))
    lite = start(parallelize={"0": column, "2": row})
    model = lite.setup(row_of_layers(8))
    facts["transform"] = told(lambda: torch.func.grad(lambda x: model(x).sum())(torch.ones(2, 4)))
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
        "columns": "parallelize['0']=ColwiseParallel(): tensor_parallel=2 does not divide its out_features=7",
        "rows": "parallelize['2']=RowwiseParallel(): tensor_parallel=2 does not divide its in_features=7",
        "batch norm": "'1', a BatchNorm1d, got what does not fit it (running_mean",
        "constant": "'1', a Heads, got what does not fit it (shape '[2, 4, 2]'",
        "transform": "was called within a transform of torch.func",
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


class Block(nn.Module):
    """A residual around a norm and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """Blocks between an embedding and a head, whose output is returned within a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(6, 4), nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.blocks(self.tokens(x)))}

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)["logits"].pow(2).mean()


class Keeping(Net):
    """Returns what it does not train on, too."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(x)
        return {**logits, "inner": self.blocks[0].up(self.tokens(x)), "tokens": x}


def split_head(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh["tensor"], {"head": ColwiseParallel()})


COLUMN, WHOLE = ColwiseParallel(), Replicate()
BLOCKS = {"blocks.*.up": COLUMN, "blocks.*.down": ROWWISE}
OVER_SEQUENCE = {
    "tokens": RowwiseParallel(input_layouts=WHOLE, output_layouts=Shard(1)),
    "blocks.*.norm": SequenceParallel(),
    "blocks.*.up": COLUMN,
    "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=WHOLE),
}


def split_outputs() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    tokens = torch.arange(12).view(2, 6) % 6
    for name, plan in {
        "head": {**BLOCKS, "*ead": COLUMN},
        "method": {**BLOCKS, "head": COLUMN},
        "rows": {"head": RowwiseParallel(input_layouts=WHOLE, output_layouts=Shard(1))},
        "function": split_head,
        "residual": {"blocks.*.up": COLUMN, "blocks.*.down": RowwiseParallel(output_layouts=Shard(1))},
        "sequence": {**BLOCKS, "blocks.*.norm": SequenceParallel()},
        "norms": {"blocks.*.norm": SequenceParallel()},
        "whole input": {"blocks.*.down": ROWWISE},
    }.items():
        lite = start(parallelize=plan)
        model = lite.setup(Net())
        call = model.loss if name == "method" else model
        facts[name] = told(lambda call=call: call(tokens))
        facts[f"{name} again"] = told(lambda model=model: model(tokens))
    for name, plan in {
        "whole": {**BLOCKS, "head": ColwiseParallel(output_layouts=WHOLE)},
        "all": OVER_SEQUENCE,
    }.items():
        lite = start(parallelize=plan)
        model = Net()
        wanted = model(tokens)["logits"]
        torch.testing.assert_close(lite.setup(model)(tokens)["logits"], wanted)
        facts[name] = len(model._forward_hooks) + len(model.blocks[0].up._forward_hooks)
    lite = start(parallelize={**BLOCKS, "head": ColwiseParallel(use_local_output=False)}, loss_parallel=True)
    facts["loss parallel"] = is_sharded(lite.setup(Net())(tokens)["logits"])
    lite = start(parallelize=BLOCKS)
    model = lite.setup(Keeping())
    with pytest.warns(UserWarning) as caught:
        lite.backward(model(tokens)["logits"].sum())
    (facts["beside"],) = [str(warning.message) for warning in caught]
    model(tokens)  # warnings are errors here
    return facts


def test_what_is_returned_split_is_refused_at_the_first_forward() -> None:
    """By the plan's key, or warned about once, where whole tensors are beside it.

    And what split outputs don't fit is explained by the styles that the plan has.
    """
    returned = "returned it as it is: a plain tensor with this rank's part, which a loss would take for the whole"
    parts = {
        "head": f"parallelize['*ead']=ColwiseParallel leaves the output of 'head' split, and Net {returned}",
        "method": "parallelize['head']=ColwiseParallel leaves the output of 'head' split",
        "rows": "parallelize['head']=RowwiseParallel leaves the output of 'head' split",
        "function": "parallelize leaves the output of 'head' split",
        "residual": "the outputs of blocks.0.down, blocks.1.down are split over the sequence",
        "sequence": "the outputs of blocks.0.norm, blocks.1.norm are split over the sequence",
        "norms": "the outputs of blocks.0.norm, blocks.1.norm are split over the sequence",
        "whole input": "blocks.0.down, blocks.1.down take 1/2 of their features on each rank, and nothing before them",
    }
    for facts in run_distributed(split_outputs):
        assert facts.pop("loss parallel")
        assert facts.pop("whole") == facts.pop("all") == 2  # the style's own, and what refuses second gradients
        assert facts["sequence"].endswith("The outputs of blocks.0.up, blocks.1.up have 1/2 of their features.")
        assert "with this rank's part" in facts["beside"]
        assert "outputs['inner'] is that of 'blocks.0.up' (parallelize['blocks.*.up']=ColwiseP" in facts.pop("beside")
        assert facts["norms"].endswith("leave SequenceParallel and Shard(1) out of parallelize.")
        for key, part in parts.items():
            assert part in facts[key] and part in facts[f"{key} again"], key


class Prepared(nn.Module):
    """A block that is split by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.block = nn.Embedding(6, 4), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.tokens(x))


OVER_BLOCK = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
PREPARED = {
    "block": PrepareModuleInput(input_layouts=(WHOLE,), desired_input_layouts=(Shard(1),), use_local_output=True),
    "block.norm": SequenceParallel(),
    **{f"block.{name}": style for name, style in OVER_BLOCK.items()},
}


def odd_lengths() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    even, odd = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    rows = {"0": COLUMN, "2": RowwiseParallel(output_layouts=Shard(1)), "3": SequenceParallel()}
    for name, plan, model, inputs in (
        ("embedding", OVER_SEQUENCE, Net(), (even, odd)),
        ("prepared", PREPARED, Prepared(), (even, odd)),
        ("rows", rows, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4)), None),
        ("whole", BLOCKS, Net(), None),
    ):
        lite = start(parallelize=plan)
        lite.setup(model)
        if inputs is not None:
            model(inputs[0])
            facts[name] = told(lambda model=model, inputs=inputs: model(inputs[1]))
        watched = [
            key
            for key, layer in model.named_modules()
            if any(getattr(hook, "func", None) is _check for hook in layer._forward_pre_hooks.values())
        ]
        facts[f"{name} looks at"] = watched
    lite = start(
        parallelize={"0": ColwiseParallel(output_layouts=Shard(1)), "1": RowwiseParallel(input_layouts=Shard(1))}
    )
    features = nn.Sequential(nn.Linear(7, 16), nn.Linear(16, 8))
    whole = copy.deepcopy(features)
    rows = torch.ones(2, 7)
    facts["features"] = torch.allclose(lite.setup(features)(rows), whole(rows))
    return facts


def test_a_length_that_ranks_do_not_divide_is_refused() -> None:
    """Where the sequence is first split, and with what to pad it to; other layers look at nothing."""
    for facts in run_distributed(odd_lengths):
        assert facts["embedding"].startswith(
            "parallelize['tokens']=RowwiseParallel splits dimension 1, the sequence, over tensor_parallel=2 ranks, and "
            "Net was given one of length 5"
        )
        assert "Pad it to 6 (a multiple of 2)" in facts["embedding"]
        assert facts["prepared"].startswith("parallelize['block']=PrepareModuleInput splits dimension 1")
        assert facts["embedding looks at"] == ["tokens"]
        assert facts["prepared looks at"] == ["block"]
        assert facts["rows looks at"] == ["2"]
        assert facts["whole looks at"] == []
        assert facts["features"]  # by their number rather than by -1


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
