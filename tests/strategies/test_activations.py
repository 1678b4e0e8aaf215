"""Layers whose activations are computed again in backward: what a step does is done once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils.parametrizations import spectral_norm

from lite import FSDPStrategy, Lite, UsageError
from tests.support.processes import run_distributed


class Block(nn.Module):
    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.mean = nn.BatchNorm1d(4, momentum=momentum)  # None: by the count of batches
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.fixed = nn.BatchNorm1d(4).eval()
        self.bare = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mean(self.norm(self.linear(x)))
        x = self.instance(x.T.unsqueeze(0)).squeeze(0).T
        return self.bare(self.fixed(x))


class Net(nn.Module):
    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(momentum) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train(checkpointing: Any, *, how: str = "eager", momentum: float | None = None) -> Any:
    """Buffers and gradients after three steps, and which graphs were compiled."""
    torch._dynamo.reset()
    counters.clear()
    strategy = FSDPStrategy(auto_wrap={Block}, activation_checkpointing=checkpointing)
    lite = Lite(accelerator="cpu", strategy=strategy)
    torch.manual_seed(0)
    model = lite.setup(Net(momentum))
    if how == "whole":
        model.compile(backend="aot_eager")
    for block in model.blocks if how == "blocks" else ():
        block.compile(backend="aot_eager")
    for step in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + lite.global_rank))
        lite.backward(model(x).pow(2).mean())
    lite.teardown()
    graphs = (counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values()))
    buffers = {name: b.tolist() for name, b in model.named_buffers()}
    return buffers, [p.grad.tolist() for p in model.parameters() if p.grad is not None], graphs


def all_ways() -> list[Any]:
    return [train(checkpointing) for checkpointing in (None, {Block}, "selective")]


def test_statistics_of_norms_are_updated_once_per_step() -> None:
    """On one and two processes as without checkpointing, bit for bit, and so are the gradients."""
    for plain, *ways in (all_ways(), *run_distributed(all_ways)):
        assert plain[0]["blocks.0.norm.num_batches_tracked"] == 3
        assert plain[0]["blocks.0.instance.running_mean"] != [0.0] * 4
        assert ways == [plain, plain]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.13's compiler asks
def test_compiled_layers_are_checkpointed_in_the_graphs_that_they_have_without() -> None:
    """None more, none fewer, no break, whole or by blocks; and statistics are updated once."""
    momentum = 0.5  # torch 2.13 breaks the graph where it is None
    expected = train(None, momentum=momentum)
    for how in ("whole", "blocks"):
        bar = train(None, how=how, momentum=momentum)[2]
        assert bar[0] > 0
        for checkpointing in ({Block}, "selective"):
            buffers, gradients, graphs = train(checkpointing, how=how, momentum=momentum)
            assert graphs == bar
            assert buffers.keys() == expected[0].keys()
            for mine, wanted in ((list(buffers.values()), list(expected[0].values())), (gradients, expected[1])):
                for a, b in zip(mine, wanted, strict=True):
                    torch.testing.assert_close(torch.tensor(a), torch.tensor(b))  # graphs may round otherwise


class Broken(nn.Module):
    """A layer that no one graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        torch._dynamo.graph_break()
        return x + y.tanh()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.13's compiler asks
@pytest.mark.parametrize("checkpointing", [{Broken}, "selective"])
def test_statistics_are_updated_once_where_the_compiler_breaks_a_layers_graph(checkpointing: Any) -> None:
    torch._dynamo.reset()
    strategy = FSDPStrategy(activation_checkpointing=checkpointing)
    lite = Lite(accelerator="cpu", strategy=strategy)
    model = lite.setup(nn.Sequential(Broken(), Broken()))
    for layer in model:
        layer.compile(backend="aot_eager")
    for _ in range(3):
        lite.backward(model(torch.randn(8, 4)).pow(2).mean())
    assert [layer.norm.num_batches_tracked.item() for layer in model] == [3, 3]


class Codebook(nn.Module):
    """Buffers that its forward reads, and writes in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(4, 4))
        self.register_buffer("codes", torch.ones(4))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("fixed", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.codes.clone() * self.scale + self.fixed
        with torch.no_grad():
            self.codes.lerp_(y.mean(0), 0.5)
            self.scale = self.scale * 0.5 + y.std() * 0.5
        return y * self.codes.clone()


def of_codebooks(checkpointing: Any, *, twice: bool = False) -> Any:
    lite = Lite(accelerator="cpu", strategy=FSDPStrategy(auto_wrap={Codebook}, activation_checkpointing=checkpointing))
    torch.manual_seed(0)
    model = lite.setup(nn.Sequential(Codebook(), Codebook()))
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(lite.global_rank))
    lite.backward((model(x[0]) + model(x[1])).pow(2).mean())  # two computations before one backward
    loss = model(x[2]).pow(2).mean()
    lite.backward(loss, retain_graph=twice)
    if twice:
        lite.backward(loss)
    with torch.no_grad():
        model(x[2])
    lite.teardown()
    return {name: b.tolist() for name, b in model.named_buffers()}, [p.grad.tolist() for p in model.parameters()]


def codebooks() -> list[Any]:
    ways = [[of_codebooks(checkpointing) for checkpointing in (None, "selective")]]
    return [*ways, [of_codebooks(checkpointing, twice=True) for checkpointing in (None, {Codebook})]]


def test_what_is_computed_again_reads_and_leaves_buffers_as_the_first_computation_did() -> None:
    """Gradients and buffers are those of a run without checkpointing, bit for bit, on one and two processes."""
    for once, twice in (codebooks(), *run_distributed(codebooks)):
        assert once[1] == once[0]
        assert twice[1] == twice[0] != once[0]


def differentiate_twice() -> str:
    lite = Lite(accelerator="cpu", strategy=FSDPStrategy(activation_checkpointing="selective"))
    model = lite.setup(Net())
    loss = model(torch.ones(2, 4)).sum()
    lite.backward(loss, retain_graph=True)
    with pytest.raises(UsageError) as error:
        lite.backward(loss)
    return str(error.value)


def test_what_selective_keeps_is_for_one_backward() -> None:
    for told in run_distributed(differentiate_twice):
        assert "activation_checkpointing='selective' keeps what a backward needs for one" in told


@pytest.mark.parametrize("checkpointing", [{Block}, "selective"])
def test_copies_and_pickles_have_layers_of_their_own(checkpointing: Any) -> None:
    """What is computed again spares the statistics of the copy's norms."""
    lite = Lite(accelerator="cpu", strategy=FSDPStrategy(activation_checkpointing=checkpointing))
    model = lite.setup(Net())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(8, 4)).sum().backward()
        assert {block.norm.num_batches_tracked.item() for block in other.blocks} == {1}
        assert all(p.grad is not None for p in other.parameters())
    assert {block.norm.num_batches_tracked.item() for block in model.blocks} == {0}


class Warms(nn.Module):
    """Writes a buffer from its third forward on."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.runs = nn.Linear(4, 4), 0
        self.register_buffer("shift", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + self.shift[:4])
        if self.runs >= 2:
            self.shift.add_(0.1)
        return y.tanh()


def warmed_up(size: int, **options: Any) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = nn.Sequential(Warms(size), Warms(size))
    lite = Lite(accelerator="cpu", strategy=FSDPStrategy(**options), precision="64-true")
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(4):
        for part in model:
            part.runs = step
        optimizer.zero_grad()
        lite.backward(model(torch.ones(2, 4, dtype=torch.float64)).pow(2).sum())
        optimizer.step()
    lite.teardown()
    return [p.sum().item() for p in model.parameters()], model[0].shift[0].item()


def test_a_buffer_that_is_first_written_later_is_right_or_refused() -> None:
    """A large one, which is not copied each time, is refused at its first write."""
    assert warmed_up(4, activation_checkpointing={Warms}) == warmed_up(4)
    with pytest.raises(UsageError, match=r"Warms\.shift was written in a forward after the first one"):
        warmed_up(1 << 17, activation_checkpointing={Warms})
