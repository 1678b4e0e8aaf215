"""What several ranks compute together: losses of split logits, random numbers, hooks, numbers that are logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader

from lite import ConfigError, Lite, ModelParallelStrategy, UsageError
from lite.loggers import Logger
from lite.sharded import is_sharded, whole
from lite.trainer import LightningModule
from tests.contracts.test_numbers import PLAN, SEQUENCE_PLAN
from tests.support.models import TinyGPT, sentences
from tests.support.processes import run_distributed
from tests.trainer.modules import trainer

SPLIT_LOGITS = {**PLAN, "head": ColwiseParallel(use_local_output=False)}


def start(plan: Any = None, **options: Any) -> Lite:
    return Lite(
        accelerator="cpu",
        strategy=ModelParallelStrategy(PLAN if plan is None else plan, **options),
        precision="64-true",
    )


def made(dropout: float = 0.0) -> TinyGPT:
    torch.manual_seed(3)
    model = TinyGPT(torch.float64)
    for block in model.blocks:
        block.norm2 = nn.Sequential(block.norm2, nn.Dropout(dropout)) if dropout else block.norm2
    return model


# ---- losses


def entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def smoothed(logits: Tensor, wanted: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return 0.9 * F.nll_loss(logs, wanted) - 0.1 * logs.mean()


def mixed(logits: Tensor, wanted: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return 0.3 * F.nll_loss(logs, wanted) + 0.7 * F.nll_loss(logs, wanted.flip(0), reduction="none").pow(2).mean()


def over_positions(logits: Tensor, wanted: Tensor) -> Tensor:
    shape = (-1, 6)
    return F.cross_entropy(logits.view(*shape, 16).transpose(1, 2), wanted.view(shape), ignore_index=3)


def weighted(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(logits, wanted, torch.linspace(0.5, 2, 16, dtype=torch.float64)) + 0.1 * entropy(
        logits, wanted
    )


def weighted_some(logits: Tensor, wanted: Tensor) -> Tensor:
    some, weight = wanted.clone(), torch.linspace(0.5, 2, 16, dtype=torch.float64)
    some[::3] = -100
    mean, total = F.cross_entropy(logits, some, weight), F.cross_entropy(logits, some, weight, reduction="sum")
    return mean + 0.1 * total + F.cross_entropy(logits, some, weight, reduction="none").pow(2).mean()


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    teacher = (0.5 * logits.detach()).log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")


LOSSES = (entropy, smoothed, mixed, over_positions, weighted, weighted_some, divergence)


def losses_of(model: TinyGPT, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
    found = {}
    (tokens,) = sentences(4)[:]
    for loss in LOSSES:
        model.zero_grad()
        value = loss(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        backward(value)
        found[loss.__name__] = whole(value.detach())
        found |= {f"{loss.__name__} {name}": whole(p.grad).clone() for name, p in model.named_parameters()}
    return found


def split_losses() -> dict[str, Tensor]:
    lite = start(SEQUENCE_PLAN, loss_parallel=True)
    return losses_of(lite.setup(made()), lite.backward)


def test_losses_of_split_logits_have_one_processs_gradients() -> None:
    """torch's loss_parallel is right for a cross-entropy alone."""
    wanted = losses_of(made(), torch.autograd.backward)
    for found in run_distributed(split_losses):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


# ---- random numbers


class Dropped(TinyGPT):
    """Drops what its first layer gives, in forward and in a method that calls layers itself."""

    rate = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * F.dropout(torch.ones((), dtype=torch.float64), self.rate)

    def method(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.blocks[0](self.tokens(tokens)), self.rate).pow(2).mean()


def train_with_dropout(seeds: tuple[int, int], rates: tuple[float, ...], method: bool) -> Any:
    lite = start()
    torch.manual_seed(3)
    model = lite.setup(Dropped(torch.float64))
    torch.manual_seed(seeds[lite.global_rank])
    (tokens,) = sentences(4)[:]
    run = model.method if method else model.loss
    try:
        for model.rate in rates:
            model.zero_grad()
            lite.backward(run(tokens))
    except UsageError as error:
        torch.manual_seed(7)  # as it says
        model.zero_grad()
        lite.backward(run(tokens))
        lite.check_sync()
        return str(error)
    return whole(model.tokens.weight.grad)


@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("rates", [(0.5,), (0.0, 0.5)])
def test_ranks_of_one_model_must_draw_alike(rates: tuple[float, ...], method: bool) -> None:
    """Whole weights would get another gradient on each rank."""
    for told in run_distributed(train_with_dropout, (7, 8), rates, method):
        assert "Dropped draws random numbers in training" in told
        assert "call torch.manual_seed(seed) with the same seed on these ranks" in told
    first, second = run_distributed(train_with_dropout, (7, 7), rates, method)
    assert torch.equal(first, second)


def test_a_seed_per_rank_is_fine_where_nothing_is_drawn() -> None:
    for gradient in run_distributed(train_with_dropout, (7, 8), (0.0,), False):
        assert isinstance(gradient, Tensor)


def resume_with_dropout(folder: str, saves: bool) -> bool:
    """Whether the ranks of one model draw alike; saved by one process, gone on with by two."""
    lite = start()
    model = lite.setup(made(0.5))
    if saves:
        lite.save(f"{folder}/x.ckpt", {"model": model})
    else:
        lite.load(f"{folder}/x.ckpt", {"model": model})
        lite.backward(model.loss(sentences(4)[:][0]))
    return True


def test_ranks_of_one_model_draw_alike_when_it_was_saved_by_another_number(tmp_path: Any) -> None:
    run_distributed(resume_with_dropout, str(tmp_path), True, world_size=1)
    assert run_distributed(resume_with_dropout, str(tmp_path), False) == [True, True]


# ---- hooks and numbers


class Keeps(Logger):
    """Keeps the numbers."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.found += [float(value) for value in metrics.values()]

    def log_hyperparams(self, params: Any) -> None:
        pass


def number_of_split_logits() -> tuple[list[float], float]:
    keeps = Keeps()
    strategy = ModelParallelStrategy(SPLIT_LOGITS)
    lite = Lite(accelerator="cpu", strategy=strategy, precision="64-true", loggers=keeps)
    model = lite.setup(made())
    number = model(sentences(4)[:][0]).detach().pow(2).mean()
    assert is_sharded(number)
    lite.log("logits", number)
    return keeps.found, float(whole(number))


def test_a_number_of_split_logits_is_logged_whole() -> None:
    """Rank 0 alone could not put it together."""
    wanted = float(made()(sentences(4)[:][0]).detach().pow(2).mean())
    (first, whole_first), (second, _) = run_distributed(number_of_split_logits)
    assert first == [whole_first] == [pytest.approx(wanted, rel=1e-12)]
    assert second == []


class Logging(LightningModule):
    """Logs a number of split logits in every form."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6)).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch)
        self.log("step", logits.mean(), on_step=True, on_epoch=False)
        for kind in ("mean", "sum", "max"):
            self.log(kind, logits.mean(), on_step=False, on_epoch=True, reduce_fx=kind, sync_dist=kind != "max")
        return whole_with_graph(logits).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def whole_with_graph(logits: Any) -> Tensor:
    return logits.full_tensor() if is_sharded(logits) else logits


def logged_by_a_trainer(strategy: str) -> tuple[dict[str, float], float]:
    plan = {"net.0": RowwiseParallel(input_layouts=Replicate()), "net.2": ColwiseParallel(use_local_output=False)}
    chosen = ModelParallelStrategy(plan) if strategy == "tp" else "auto"
    module, run = Logging(), trainer(strategy=chosen)
    rows = torch.randn(11, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    run.fit(module, DataLoader(rows, batch_size=4))
    found = run.callback_metrics
    assert not any(map(is_sharded, found.values()))
    return {name: float(value) for name, value in found.items()}, run.clocks()["samples"]


def test_a_trainer_logs_numbers_of_split_logits_and_counts_samples_once() -> None:
    wanted, samples = logged_by_a_trainer("single")
    assert samples == 11
    for found, counted in run_distributed(logged_by_a_trainer, "tp"):
        assert found == pytest.approx(wanted, rel=1e-12)
        assert counted == 11


def plain_mask(data_parallel: int, loss_parallel: bool) -> str:
    lite = start(SPLIT_LOGITS, data_parallel=data_parallel, loss_parallel=loss_parallel)
    model = lite.setup(made())
    weight = model.blocks[0].q.weight
    mask = torch.zeros(8, 8, dtype=torch.float64)

    def masked(gradient: Tensor) -> Tensor:
        return gradient * mask

    handle = weight.register_hook(masked)
    (tokens,) = sentences(4)[:]
    logits = model(tokens[:, :-1])
    with pytest.raises(UsageError) as error:
        lite.backward(logits.full_tensor().pow(2).mean())
    handle.remove()
    model.zero_grad()
    split: list[Tensor] = []

    def split_masked(gradient: Tensor) -> Tensor:
        if not split:
            split.append(distribute_tensor(mask, gradient.device_mesh, gradient.placements))
        return gradient * split[0]

    weight.register_hook(split_masked)
    lite.backward(model(tokens[:, :-1]).full_tensor().pow(2).mean())
    assert not whole(weight.grad).any()
    return str(error.value)


@pytest.mark.parametrize(("data_parallel", "loss_parallel"), [(1, False), (1, True), (2, False)])
def test_a_hook_on_a_split_parameter_says_that_it_gets_a_part(data_parallel: int, loss_parallel: bool) -> None:
    for told in run_distributed(plain_mask, data_parallel, loss_parallel, world_size=2 * data_parallel):
        assert told.startswith("the hook 'masked' (")
        assert "distribute_tensor(mask," in told


# ---- compiled blocks


def compiled_blocks() -> tuple[Tensor, str]:
    lite = start()
    model = made()
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="eager")
    model = lite.setup(model)
    with torch.compiler.set_stance("force_eager"):  # torch 2.13 can't compile these, with lite or without
        lite.backward(model.loss(sentences(4)[:][0]))
    assert is_sharded(model.blocks[0].q.weight)
    lite = start(compile_blocks=True, activation_checkpointing={type(made().blocks[0])})
    with pytest.raises(ConfigError) as error:
        lite.setup(made())
    return whole(model.tokens.weight.grad), str(error.value)


def test_a_plan_finds_blocks_that_were_compiled_before() -> None:
    model = made()
    model.loss(sentences(4)[:][0]).backward()
    for gradient, told in run_distributed(compiled_blocks):
        torch.testing.assert_close(gradient, model.tokens.weight.grad, rtol=0, atol=1e-12)
        assert "use activation_checkpointing='selective'" in told
