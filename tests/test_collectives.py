"""Communication: new values, unequal sizes, one meaning on one process and on several."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lite import Lite, UsageError, collectives
from tests.support.processes import run_distributed

Pair = namedtuple("Pair", "a b")


def reductions() -> dict[str, object]:
    lite = Lite(accelerator="cpu")
    r = lite.global_rank
    x = torch.tensor([1.0, 2.0]) + r
    kept = x.clone()
    out = lite.all_reduce({"x": x, "n": 1 + r, "f": 0.5 + r, "s": "text"}, "mean")
    assert torch.equal(x, kept)
    return {
        "mean": out,
        "int mean": lite.all_reduce(torch.tensor([1 + r, 2])),
        "sum": lite.all_reduce(torch.tensor(1 + r), "sum").item(),
        "max": lite.all_reduce(1.5 + r, "max"),
        "order": lite.all_reduce({"a": 1.0, "b": 10.0} if r else {"b": 10.0, "a": 1.0}),
        "subgroup": collectives.all_reduce({"n": 1 + r}, "sum", group=dist.new_group([0, 1])),
        "bool": lite.all_reduce(torch.tensor([True, r == 0]), "sum").tolist(),
    }


def test_all_reduce_returns_new_values_and_keeps_fractions() -> None:
    """A mean of whole numbers is not cut off, the input is not changed, other leaves pass."""
    for out in run_distributed(reductions):
        assert out["mean"]["x"].tolist() == [1.5, 2.5]
        assert (out["mean"]["n"], out["mean"]["f"], out["mean"]["s"]) == (1.5, 1.0, "text")
        assert out["int mean"].tolist() == [1.5, 2.0]
        assert (out["sum"], out["max"], out["bool"]) == (3, 2.5, [2, 1])
        assert (out["order"], out["subgroup"]) == ({"a": 1.0, "b": 10.0}, {"n": 3})


def gathers() -> dict[str, object]:
    lite = Lite(accelerator="cpu")
    r = lite.global_rank
    uneven = torch.full((r + 1, 2), float(r))
    x = torch.ones(2, requires_grad=True)
    (lite.all_gather(x * (r + 1), sync_grads=True) * torch.tensor([[1.0], [2.0]])).sum().backward()
    return {
        "stacked": lite.all_gather(Pair(torch.tensor([r, r]), "s")),
        "number": lite.all_gather(float(r)).tolist(),
        "uneven": [p.tolist() for p in lite.all_gather(uneven)],
        "cat": lite.all_gather(uneven, cat=True).tolist(),
        "empty": lite.all_gather(torch.ones(r, 3), cat=True).shape,
        "column": lite.gather_for_metrics(torch.full((2 - r, 2), float(r))[:, 0]).tolist(),
        "conj": lite.all_gather(torch.tensor([r + 1j]).conj(), cat=True).tolist(),
        "grad": x.grad,
    }


def test_all_gather_takes_unequal_first_dimensions() -> None:
    """Stacked where shapes are equal, one tensor per rank or concatenated where not; gradients flow where asked."""
    for rank, out in enumerate(run_distributed(gathers)):
        assert out["stacked"].a.tolist() == [[0, 0], [1, 1]]
        assert out["stacked"].b == "s"
        assert out["number"] == [0.0, 1.0]
        assert out["uneven"] == [[[0, 0]], [[1, 1], [1, 1]]]
        assert out["cat"] == [[0, 0], [1, 1], [1, 1]]
        assert tuple(out["empty"]) == (1, 3)
        assert out["column"] == [0.0, 0.0, 1.0]  # one element is contiguous, whatever its stride is
        assert out["conj"] == [-1j, 1 - 1j]
        # Each rank's loss counts rank r's part (r + 1) times; both ranks' losses flow back.
        assert out["grad"].tolist() == [2.0 * (rank + 1) * (rank + 1)] * 2


def test_one_process_has_the_same_shapes() -> None:
    """A gathered tensor has its rank dimension on one process too."""
    lite = Lite(accelerator="cpu")
    assert lite.all_gather(torch.ones(3)).shape == (1, 3)
    assert lite.all_gather(torch.ones(3), cat=True).shape == (3,)
    assert lite.all_reduce(torch.tensor([1, 2])).dtype == torch.float64
    assert lite.broadcast("x") == "x"
    assert lite.gather_for_metrics([torch.ones(2)])[0].shape == (2,)


def odds_and_ends() -> tuple[object, list[str]]:
    lite = Lite(accelerator="cpu")
    order: list[str] = []
    got = lite.broadcast({"t": torch.arange(2) + lite.global_rank, "k": [lite.global_rank]}, src=1)
    with lite.rank_zero_first():
        order = lite.broadcast(order) if False else order
        order.append(str(lite.global_rank))
    with lite.rank_zero_first(local=True):
        order.append("local")
    lite.barrier()
    return got, order


def test_broadcast_and_rank_zero_first() -> None:
    """Any object from any rank; both ranks go through the block."""
    for rank, (got, order) in enumerate(run_distributed(odds_and_ends)):
        assert got["t"].tolist() == [1, 2]
        assert got["k"] == [1]
        assert order == [str(rank), "local"]


def ordered(path: str) -> str:
    import time

    lite = Lite(accelerator="cpu")
    with lite.rank_zero_first():
        if lite.is_global_zero:
            time.sleep(0.3)
        with open(path, "a") as file:
            file.write(str(lite.global_rank))
    lite.barrier()
    return open(path).read()


def test_rank_zero_runs_the_block_first(tmp_path: object) -> None:
    """Rank 1 waits, however long rank 0 takes."""
    assert run_distributed(ordered, f"{tmp_path}/order") == ["01", "01"]


DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int64", "float16", "bfloat16", "float8_e4m3fn", "complex64"]


def every_dtype() -> list[bool]:
    lite = Lite(accelerator="cpu")
    wanted = torch.arange(6).view(3, 2) % 2
    kept = []
    for name in DTYPES:
        dtype = getattr(torch, name)
        mine = (wanted[:1] if lite.global_rank == 0 else wanted[1:]).to(dtype)
        assert lite.broadcast({"x": wanted.to(dtype)} if lite.is_global_zero else None)["x"].dtype == dtype
        for out in (lite.all_gather(mine, cat=True), lite.gather_for_metrics(mine)):
            kept.append(out.dtype == dtype and torch.equal(out.to(torch.complex64), wanted.to(torch.complex64)))
    assert lite.all_gather(torch.ones(2, 3).t())[1].shape == (3, 2)
    return kept


def test_every_dtype_can_be_gathered() -> None:
    """Also those that the backend doesn't send, with unequal first dimensions."""
    assert all(all(kept) for kept in run_distributed(every_dtype))


def objects() -> list[object]:
    lite = Lite(accelerator="cpu")
    loader = lite.setup_dataloaders(DataLoader(range(5), batch_size=4))
    out: list[object] = []
    with torch.no_grad():
        for batch in loader:
            boxes = [torch.full((i + 1,), float(i)) for i in batch.tolist()]
            found = lite.gather_for_metrics({"boxes": [{"box": box} for box in boxes], "pair": (batch, boxes)})
            out.append([entry["box"].tolist() for entry in found["boxes"]])
            out.append([found["pair"][0].tolist(), [box.tolist() for box in found["pair"][1]]])
    return out


def test_a_list_holds_one_object_per_sample() -> None:
    """Tensors of different shapes, or dicts of them; tuples and dicts are nesting."""
    boxes = [[float(i)] * (i + 1) for i in range(5)]
    assert run_distributed(objects) == [[boxes, [[0, 1, 2, 3, 4], boxes]]] * 2


def whole_batches() -> list[int]:
    lite = Lite(accelerator="cpu")
    gathered: list[int] = []
    with torch.no_grad():
        for batch in lite.setup_dataloaders(DataLoader(range(22), batch_size=4)):
            with pytest.raises(UsageError, match=r"list of 5 .*gather_for_metrics\(\(predictions, targets\)\)"):
                lite.gather_for_metrics({"x": [batch] * 5})
            five = lite.gather_for_metrics([torch.ones(5)] * len(batch))  # five boxes for each sample, say
            both = lite.gather_for_metrics((batch, batch))
            assert len(both[0]) == len(both[1]) == len(five)
            gathered.extend(both[0].tolist())
    assert len(lite.gather_for_metrics([torch.ones(4)] * 5)) == 5 * lite.world_size  # no batch to compare it with
    for _ in lite.setup_dataloaders(DataLoader(range(22), batch_size=4)):
        break
    assert len(lite.gather_for_metrics(["a", "b", "c"])) == 3 * lite.world_size
    return gathered


def test_a_list_of_whole_batches_is_refused() -> None:
    """On one process as on two, for full batches as for ragged ones; a tuple of them is gathered."""
    assert [whole_batches(), *run_distributed(whole_batches)] == [list(range(22))] * 3


def gather_late() -> list[str]:
    lite = Lite(accelerator="cpu")
    messages = []
    for use_list in (False, True):
        seen = []
        with torch.no_grad():
            for batch in lite.setup_dataloaders(DataLoader(range(5), batch_size=2)):
                seen.append(batch)
        everything = torch.cat(seen)
        try:
            lite.gather_for_metrics(everything.tolist() if use_list else everything)
        except UsageError as error:
            messages.append(str(error))
    return messages


def test_gathering_after_the_loop_is_refused_where_it_would_count_a_filler() -> None:
    """On all ranks, also those whose own last batch is real."""
    for messages in run_distributed(gather_late):
        assert len(messages) == 2
        assert all("gather each batch inside the loop" in message for message in messages)


def nested_blocks() -> list[str]:
    lite = Lite(accelerator="cpu")
    order = []
    with lite.rank_zero_first(), lite.rank_zero_first(), lite.rank_zero_first(local=True):
        order.append("in")
    other = Lite(accelerator="cpu")  # shares the store
    for it in (lite, other, other, lite):
        with it.rank_zero_first():
            order.append("again")
    for call in (lite.barrier, lambda: lite.all_reduce(1), lambda: lite.setup(torch.nn.Linear(1, 1))):
        try:
            with lite.rank_zero_first():
                call()
        except UsageError as error:
            order.append("needs all ranks" if "needs all ranks" in str(error) else str(error))
    lite.barrier()
    return order


def test_blocks_may_be_nested_and_collectives_inside_are_refused() -> None:
    """Neither waits for a rank that has not entered yet."""
    assert run_distributed(nested_blocks) == [["in", *["again"] * 4, *["needs all ranks"] * 3]] * 2


@pytest.mark.parametrize("op", ["mean", "avg", "sum", "min", "max", "product"])
def test_every_reduction_is_the_identity_on_one_process(op: str) -> None:
    """Of floats."""
    x = torch.tensor([1.5, -2.0])
    assert torch.equal(Lite(accelerator="cpu").all_reduce(x, op), x)
