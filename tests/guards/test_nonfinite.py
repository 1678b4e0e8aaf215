"""An inf or NaN on one rank is an error on all, with the first bad step and its name."""

from __future__ import annotations

import pytest
import torch

from lite import ConfigError, Lite, NonFiniteError
from tests.support.processes import run_distributed

NAN = float("nan")


def test_the_first_bad_step_is_named() -> None:
    """At the next look, not before; values come back as they were given."""
    guard = Lite(accelerator="cpu").nan_guard(every=4)
    loss = torch.tensor(1.0, requires_grad=True)
    assert guard(loss) is loss
    logits = torch.ones(3, 2)
    assert [v is w for v, w in zip(guard(loss, logits=logits), (loss, logits), strict=True)] == [True, True]
    guard(loss, logits=logits / 0)
    with pytest.raises(NonFiniteError, match=r"inf or NaN in 'logits', first at its call number 2 "):
        guard(loss * NAN, logits=logits)
    guard.check()  # the bad ones were reported once


def test_what_happens_to_a_tensor_later_does_not_count() -> None:
    """A loop may use its memory again."""
    guard = Lite(accelerator="cpu").nan_guard(every=10)
    loss = torch.tensor(NAN)
    guard(loss=loss)
    loss.fill_(1.0)
    with pytest.raises(NonFiniteError, match="'loss', first at its call number 0"):
        guard.check()
    guard(loss)
    loss.fill_(NAN)
    guard.check()


@pytest.mark.parametrize("bad", [float("inf"), torch.tensor(-float("inf")), torch.tensor([1.0, NAN]), NAN])
def test_numbers_and_tensors_of_any_shape(bad: object) -> None:
    """As a context it looks at the end, unless something else was raised."""
    lite = Lite(accelerator="cpu")
    with pytest.raises(NonFiniteError), lite.nan_guard() as guard:
        guard(3)
        guard(torch.tensor([2]), torch.tensor(True), torch.ones((), dtype=torch.bfloat16))
        guard(bad)
    with pytest.raises(ZeroDivisionError), lite.nan_guard() as guard:
        guard(bad)
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match="every=0"):
        lite.nan_guard(every=0)


@pytest.mark.parametrize("wrong", ["loss", None, [1.0], {"a": 1.0}, (torch.ones(1),)], ids=repr)
def test_what_is_no_number_is_refused_by_name(wrong: object) -> None:
    """Its argument's name or place, its value, and how to give it; nothing of that call counts."""
    guard = Lite(accelerator="cpu").nan_guard(every=2)
    with pytest.raises(ConfigError, match=r"nan_guard got argument 1=.*, a \w+; give it tensors or numbers"):
        guard(NAN, wrong)
    with pytest.raises(ConfigError, match=r"nan_guard got loss=.*, a \w+; give it tensors or numbers"):
        guard(loss=wrong)
    assert guard.count == 0
    guard.check()
    assert guard(10**400, complex(1, 2)) == (10**400, complex(1, 2))
    with pytest.raises(NonFiniteError):
        guard(complex(1, NAN))


def one_is_bad() -> str:
    lite = Lite(accelerator="cpu")
    guard = lite.nan_guard(every=5)
    for step in range(20):
        bad = (lite.global_rank == 1 and step >= 7) or (lite.global_rank == 0 and step >= 8)
        try:
            guard(torch.tensor(1.0), loss=torch.tensor(NAN if bad else 1.0))
        except NonFiniteError as error:
            return f"{step}: {error}"
    return "nothing"


def test_all_ranks_raise_at_once() -> None:
    """At the same call, with the same words, whoever was bad first."""
    zero, one = run_distributed(one_is_bad)
    assert zero == one
    assert zero.startswith("9: nan_guard found an inf or NaN in 'loss' on rank 1, first at its call number 7 ")
