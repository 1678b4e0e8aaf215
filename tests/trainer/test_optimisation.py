"""Behaviours 9 to 18: what a step does with loss, gradients, optimizers, schedulers and modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from lite.errors import ConfigError, UsageError
from lite.trainer import hooks
from lite.trainer.profilers import SimpleProfiler
from tests.trainer.modules import Numbers, Tiny, TinyData, by_hand, numbers, trainer, weights

OPTIONS = {"limit_val_batches": 0}


def test_behaviour_9_the_loss_may_be_a_tensor_a_dict_or_none() -> None:
    """And what on_train_batch_end gets is the loss as it was returned, without its graph."""
    outputs: list[Any] = []

    class Forms(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return {0: loss, 1: {"loss": loss, "more": loss * 2}, 2: None}[batch_idx]

        def on_train_batch_end(self, found: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(found)

    module, run = Forms(), trainer(**OPTIONS)
    with pytest.warns(UserWarning, match="returned None"):
        run.fit(module, numbers())
    assert weights(module) == by_hand(12, [[4], [4]])
    assert set(outputs[0]) == {"loss"}
    assert float(outputs[1]["more"]) == 2 * float(outputs[1]["loss"])
    assert not outputs[0]["loss"].requires_grad
    assert outputs[2] is None
    assert run.global_step == 3  # as the reference counts

    class Empty(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"losses": 1}

    with pytest.raises(ConfigError, match=r"keys \['losses'\] and without 'loss'"):
        trainer(**OPTIONS).fit(Empty(), numbers())


def test_behaviour_10_a_loss_without_a_graph_is_an_error_that_says_so() -> None:
    """Detached, or computed without gradients."""

    class Detached(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return self.loss(batch).detach()

    with pytest.raises(UsageError, match="needs no gradient"):
        trainer(**OPTIONS).fit(Detached(), numbers())


def test_behaviour_10_detect_anomaly_finds_non_finite_gradients() -> None:
    """And torch's own setting is put back."""

    class Nan(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return (self.loss(batch) * 0).sqrt() * 0

    with pytest.raises(RuntimeError, match="nan"), pytest.warns(UserWarning, match="Error detected"):
        trainer(detect_anomaly=True, **OPTIONS).fit(Nan(), numbers())
    assert not torch.is_anomaly_enabled()


def test_behaviour_11_several_optimizers_need_manual_optimisation() -> None:
    """And the form of older versions is answered with the new one."""

    class Two(Tiny):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[3].parameters(), 0.1)]

    with pytest.raises(ConfigError, match=r"2 optimizers.*automatic_optimization = False"):
        trainer(**OPTIONS).fit(Two(), numbers())

    class Old(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int, optimizer_idx: int) -> Any:  # type: ignore[override]
            return self.loss(batch)

    with pytest.raises(ConfigError, match="form of older versions"):
        trainer(**OPTIONS).fit(Old(), numbers())


class Manual(Tiny):
    """Two optimizers in the module's own hand: the second one every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.calls: list[str] = []

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
        second = torch.optim.SGD(self.net[3].parameters(), lr=0.1)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 1, 0.5)]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        first, second = self.optimizers()
        assert isinstance(first, torch.optim.SGD)
        loss = self.loss(batch)
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, 0.5, "norm")
        first.step()
        if batch_idx % 2:
            second.step(lambda: loss)
        self.lr_schedulers().step()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("step")

    def on_after_backward(self) -> None:
        self.calls.append("backward")


def test_behaviour_12_every_optimizer_step_counts_in_manual_mode() -> None:
    """global_step, hooks and max_steps; the numbers are those of the same loop by hand."""
    module, run = Manual(), trainer(**OPTIONS)
    run.fit(module, numbers())
    assert (run.global_step, run.fit_loop.progress.batches) == (4, 3)
    assert module.calls == ["backward", "step", "backward", "step", "step", "backward", "step"]
    by = Tiny()
    first = torch.optim.SGD(by.net[0].parameters(), lr=0.1)
    second = torch.optim.SGD(by.net[3].parameters(), lr=0.1)
    for i, batch in enumerate(Numbers(12).rows.split(4)):
        first.zero_grad()
        second.zero_grad()
        by.loss(batch).backward()
        nn.utils.clip_grad_norm_(by.net[0].parameters(), 0.5)
        first.step()
        if i % 2:
            second.step()
        first.param_groups[0]["lr"] *= 0.5
    assert weights(module) == weights(by)
    run = trainer(max_epochs=-1, max_steps=3, **OPTIONS)
    run.fit(Manual(), numbers())
    assert run.global_step == 3


def test_manual_steps_have_profilers_and_what_1_8_had_follow_them() -> None:
    """As automatic ones: `training_step_end` gets what training_step returned, and its own is what counts."""
    outputs: list[Any] = []

    class Old(Manual):
        def training_step_end(self, output: Any) -> Any:
            return {"loss": output, "more": 1}

        def on_train_batch_end(self, found: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(found)

    profiler = SimpleProfiler()
    with pytest.warns(DeprecationWarning, match="training_step_end"):
        trainer(profiler=profiler, **OPTIONS).fit(Old(), numbers())
    assert [set(found) for found in outputs] == [{"loss", "more"}] * 3
    assert "[Old].training_step" in profiler.seconds


def test_manual_optimisation_looks_at_the_modules_backward_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at the override of a scheduler's step once per epoch: signatures are slow to read."""
    looks: list[str] = []

    def counted(method: Any) -> Any:
        looks.append(method.__name__)
        return signature(method)

    signature = hooks.inspect.signature

    class Own(Manual):
        def backward(self, loss: Tensor) -> None:
            loss.backward()

    monkeypatch.setattr(hooks.inspect, "signature", counted)
    trainer(**OPTIONS).fit(Own(), numbers())
    assert looks.count("backward") == 1

    module: Any = scheduled(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), interval="step")
    module.lr_scheduler_step = lambda scheduler, metric: scheduler.step()
    module.lr_scheduler_step.__name__ = "lr_scheduler_step"
    looks.clear()
    trainer(**OPTIONS).fit(module, numbers())
    assert looks.count("lr_scheduler_step") == 1


def test_manual_optimisation_refuses_what_only_automatic_optimisation_does() -> None:
    """Clipping and accumulation by argument; and manual_backward where it is automatic."""
    for options in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}):
        with pytest.raises(ConfigError, match="automatic_optimization = False"):
            trainer(**options, **OPTIONS).fit(Manual(), numbers())

    class Both(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.manual_backward(self.loss(batch))

    with pytest.raises(UsageError, match="two backwards"):
        trainer(**OPTIONS).fit(Both(), numbers())


def test_behaviour_13_toggling_restores_what_was_frozen() -> None:
    """requires_grad of the others, exactly."""

    class Toggles(Manual):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.net[0].bias.requires_grad = False
            first, second = self.optimizers()
            with self.toggled_optimizer(second):
                flags = [p.requires_grad for p in self.parameters()]
                assert flags == [False, False, True, True]
            assert [p.requires_grad for p in self.parameters()] == [True, False, True, True]
            self.toggle_optimizer(first)
            assert [p.requires_grad for p in self.parameters()] == [True, False, False, False]
            self.untoggle_optimizer(first)

    trainer(limit_train_batches=1, **OPTIONS).fit(Toggles(), numbers())


def scheduled(scheduler: Any, **config: Any) -> Any:
    class Scheduled(Tiny):
        rates: list[float] = []  # noqa: RUF012

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            made = scheduler(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **config}}

        def on_train_batch_start(self, *args: Any) -> None:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    Scheduled.rates = []
    return Scheduled()


def test_behaviour_14_schedulers_step_when_they_are_due() -> None:
    """Per epoch, per optimizer step (not per batch), with a frequency, and by a metric."""

    def halving(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def rates(module: Any, **options: Any) -> list[float]:
        trainer(**{"max_epochs": 2, **OPTIONS, **options}).fit(module, numbers(16), numbers())
        return module.rates

    assert rates(scheduled(halving)) == [1.0] * 4 + [0.5] * 4
    assert rates(scheduled(halving, frequency=2), max_epochs=4) == [1.0] * 8 + [0.5] * 8
    assert rates(scheduled(halving, interval="step"), accumulate_grad_batches=2) == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
        0.125,
    ]
    assert rates(scheduled(halving, interval="step", frequency=3)) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]

    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)

    assert rates(scheduled(plateau, monitor="val"), limit_val_batches=1.0) == [1.0] * 4 + [0.5] * 4
    seldom: dict[str, Any] = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 2}
    with pytest.raises(ConfigError, match=r"first validation is still to come .*by 'frequency': 2"):
        rates(scheduled(plateau, monitor="val"), **seldom)
    assert rates(scheduled(plateau, monitor="val", frequency=2), **seldom)
    with pytest.raises(ConfigError, match=r"monitors 'nothing'.*logged were 'loss'"):
        rates(scheduled(plateau, monitor="nothing"))
    with pytest.warns(UserWarning, match="does not step"):
        rates(scheduled(plateau, monitor="nothing", strict=False))
    with pytest.raises(ConfigError, match="needs a metric"):
        rates(scheduled(plateau))


def test_behaviour_14_estimated_stepping_batches_is_known_in_configure_optimizers() -> None:
    """OneCycle's total_steps: with accumulation, limits and epochs."""

    class Cycle(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.total = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=self.total)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    module, run = Cycle(), trainer(max_epochs=2, accumulate_grad_batches=2, **OPTIONS)
    run.fit(module, numbers(18))
    assert module.total == run.global_step == 6
    for schedule in ({0: 3}, {0: 1, 1: 4}, {1: 5}):
        module, run = Cycle(), trainer(max_epochs=3, accumulate_grad_batches=schedule, **OPTIONS)
        run.fit(module, numbers(18))
        assert module.total == run.global_step == run.estimated_stepping_batches
    module, run = Cycle(), trainer(max_epochs=9, max_steps=4, **OPTIONS)
    run.fit(module, numbers())
    assert module.total == run.global_step == 4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_behaviour_15_clipping_comes_after_the_hook_and_an_override_wins(algorithm: str) -> None:
    """on_before_optimizer_step sees gradients as they are."""
    seen: list[float] = []

    class Clips(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(max(float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None))

        def on_train_batch_end(self, *args: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            size = nn.utils.get_total_norm(grads) if algorithm == "norm" else max(g.abs().max() for g in grads)
            assert float(size) == pytest.approx(0.01, rel=1e-4)

    trainer(gradient_clip_val=0.01, gradient_clip_algorithm=algorithm, **OPTIONS).fit(Clips(), numbers())
    assert min(seen) > 0.01

    class Own(Tiny):
        def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
            assert value == 0.01
            nn.utils.clip_grad_value_(self.parameters(), 0.0)

    module = Own()
    before = weights(module)
    trainer(gradient_clip_val=0.01, **OPTIONS).fit(module, numbers())
    assert weights(module) == before


class SeesNorms(Tiny):
    """Notes the gradients' norm in the hook before each step, and after it; clips by torch alone where asked."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.seen: list[float] = []

    def norm(self) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(self.norm())


class ClipsByTorch(SeesNorms):
    def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01)


@pytest.mark.parametrize("form", ["hook", "clipped", "own", "manual"])
def test_behaviour_15_a_loss_scale_is_gone_before_the_hook_and_clipping(form: str) -> None:
    """Under "16-mixed": the gradients that they see, and the weights, are those of full precision."""
    found = []
    for precision in ("32-true", "16-mixed"):
        module = ClipsByTorch() if form == "own" else SeesNorms(manual=form == "manual")
        clip = {"gradient_clip_val": 0.01} if form == "clipped" else {}
        trainer(precision=precision, **clip, **OPTIONS).fit(module, numbers())
        found.append([module.seen, weights(module)])
    # float64 is left alone by autocast, and the scale is a power of 2.
    assert found[0] == found[1]
    assert len(found[0][0]) == 3


def test_behaviour_16_modes_are_given_back_as_they_were() -> None:
    """A submodule that evaluates goes on doing so."""

    class Frozen(Tiny):
        modes: list[Any] = []  # noqa: RUF012

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.modes.append((self.training, self.net[0].training))
            return self.loss(batch)

        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            assert not self.training
            assert not self.net[0].training

    module = Frozen()
    module.net[0].eval()
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(module, datamodule=TinyData())
    assert set(module.modes) == {(True, False)}


def test_behaviour_17_evaluation_has_no_gradients_and_they_come_back() -> None:
    """Also after an exception; inference_mode alone, no_grad within fit."""
    modes: list[tuple[bool, bool]] = []

    class Looks(Tiny):
        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            if self.net[0].bias.requires_grad is False:
                raise RuntimeError("stop")

    module = Looks()
    trainer().fit(module, datamodule=TinyData())
    trainer().validate(module, datamodule=TinyData(), verbose=False)
    trainer(inference_mode=False).validate(module, datamodule=TinyData(), verbose=False)
    assert list(dict.fromkeys(modes)) == [(False, False), (False, True)]
    module.freeze()
    with pytest.raises(RuntimeError, match="stop"):
        trainer().validate(module, datamodule=TinyData())
    assert torch.is_grad_enabled()


def test_behaviour_18_optimizer_step_may_call_the_closure_skip_it_or_wait() -> None:
    """Only real steps count, and LBFGS calls the closure several times."""

    class Every(Tiny):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if batch_idx == 0:
                optimizer.step(closure=optimizer_closure)
            elif batch_idx == 1:
                optimizer_closure()
                optimizer.step()

    module, run = Every(), trainer(**OPTIONS)
    run.fit(module, numbers())
    assert run.global_step == run.fit_loop.progress.stepped == 2
    assert weights(module) == by_hand(12, [[4], [4]])

    class Newton(Tiny):
        calls = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.calls += 1
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    newton, run = Newton(), trainer(limit_train_batches=1, **OPTIONS)
    run.fit(newton, numbers())
    assert newton.calls > 1
    assert run.global_step == 1

    class LogsBetween(Newton):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("loss", self.loss(batch))
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss: Tensor) -> None:
            self.log("before", loss)

        def on_after_backward(self) -> None:
            self.log("after", 1.0)

    run = trainer(limit_train_batches=1, gradient_clip_val=1.0, **OPTIONS)
    run.fit(LogsBetween(), numbers())
    assert run.callback_metrics.keys() == {"loss", "before", "after"}


def test_one_process_equals_the_raw_loop_bit_for_bit() -> None:
    """Weights after two epochs of SGD, with clipping and dropout."""
    module = Tiny(dropout=0.3)
    torch.manual_seed(1)
    trainer(max_epochs=2, gradient_clip_val=0.5, **OPTIONS).fit(module, numbers(18, shuffle=True))
    raw = Tiny(dropout=0.3)
    torch.manual_seed(1)
    loader = numbers(18, shuffle=True)
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.05)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            raw.loss(batch).backward()
            nn.utils.clip_grad_norm_(raw.parameters(), 0.5)
            optimizer.step()
    assert weights(module) == weights(raw)


@pytest.mark.parametrize("form", ["one", "list", "lists", "dict", "dicts", "generator", "none"])
def test_configure_optimizers_takes_every_form(form: str) -> None:
    """One optimizer with a scheduler or without, however they are returned."""

    class Forms(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            forms = {
                "one": optimizer,
                "list": [optimizer],
                "lists": ([optimizer], [scheduler]),
                "dict": {"optimizer": optimizer, "lr_scheduler": scheduler},
                "dicts": [{"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": "x"}}],
                "generator": (one for one in [optimizer]),
            }
            return forms.get(form)

    run, module = trainer(**OPTIONS), Forms()
    if form == "none":
        before = weights(module)
        with pytest.warns(UserWarning, match="without an optimizer"):
            run.fit(module, numbers())
        assert weights(module) == before
        return
    run.fit(module, numbers())
    assert len(run.optimizers) == 1
    assert len(run.lr_scheduler_configs) == (form in ("lists", "dict", "dicts"))


def test_configure_optimizers_refuses_what_it_does_not_know() -> None:
    """With the forms that there are."""
    for wrong, message in (
        ("adam", "returned a str"),
        ({"lr": 1}, "without an 'optimizer'"),
        ({"optimiser": "an Adam"}, r"returned {'optimiser': 'an Adam'} without an 'optimizer'; return"),
        ((Adam([nn.Parameter(torch.ones(1))]), None), r"returned \(Adam, NoneType\); return"),
        ({"optimizer": Adam([nn.Parameter(torch.ones(1))]), "lr_schedular": 1}, "did you mean 'lr_scheduler'"),
        ([1, 2], "list of optimizers"),
    ):

        class Wrong(Tiny):
            def configure_optimizers(self, wrong: Any = wrong) -> Any:
                return wrong

        with pytest.raises(ConfigError, match=message):
            trainer(**OPTIONS).fit(Wrong(), numbers())


def test_gradient_norms_are_logged_where_asked() -> None:
    """track_grad_norm, by parameter and in total."""
    run = trainer(track_grad_norm=2, limit_train_batches=1, **OPTIONS)
    run.fit(Tiny(), numbers())
    found = {k: float(v) for k, v in run.callback_metrics.items() if "norm" in k}
    total = found.pop("grad_2.0_norm_total")
    assert len(found) == 4
    assert total == pytest.approx(sum(v**2 for v in found.values()) ** 0.5)


class FormsOf18(Tiny):
    """Overrides as modules of PyTorch Lightning 1.8 have them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Any] = {}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu, using_lbfgs=True):  # type: ignore[no-untyped-def, override]
        self.calls["step"] = (optimizer_idx, on_tpu, using_lbfgs)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_idx, optimizer_closure, on_tpu=on_tpu)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer, optimizer_idx):  # type: ignore[no-untyped-def, override]
        self.calls["zero"] = optimizer_idx
        super().optimizer_zero_grad(epoch, batch_idx, optimizer, optimizer_idx)

    def backward(self, loss, optimizer, optimizer_idx):  # type: ignore[no-untyped-def, override]
        self.calls["backward"] = (type(optimizer).__name__, optimizer_idx)
        super().backward(loss, optimizer, optimizer_idx)

    def lr_scheduler_step(self, scheduler, optimizer_idx, metric):  # type: ignore[no-untyped-def, override]
        self.calls["scheduler"] = (optimizer_idx, metric)
        super().lr_scheduler_step(scheduler, optimizer_idx, metric)

    def configure_gradient_clipping(self, optimizer, optimizer_idx, gradient_clip_val, gradient_clip_algorithm):  # type: ignore[no-untyped-def, override]
        self.calls["clip"] = (optimizer_idx, gradient_clip_val, gradient_clip_algorithm)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_overrides_in_the_form_of_1_8_are_called_by_their_parameters_names() -> None:
    """With optimizer_idx, which they may hand on; the weights are those of the present form."""
    options: dict[str, Any] = {**OPTIONS, "gradient_clip_val": 0.5, "max_epochs": 2}
    module, plain = FormsOf18(), Tiny()
    trainer(**options).fit(module, numbers())
    assert module.calls == {
        "step": (0, False, False),
        "zero": 0,
        "backward": ("SGD", 0),
        "scheduler": (0, None),
        "clip": (0, 0.5, None),
    }
    plain.configure_optimizers = FormsOf18.configure_optimizers.__get__(plain)  # type: ignore[method-assign]
    trainer(**options).fit(plain, numbers())
    assert weights(module) == weights(plain)
    with pytest.raises(TypeError, match="unexpected arguments"):
        plain.optimizer_step(0, 0, None, None, closure=None)


def test_within_optimizer_step_global_step_is_the_step_that_is_made() -> None:
    """As in Lightning, so that its recipe for a warm-up gives the same rates."""
    rates: list[float] = []

    class WarmUp(Tiny):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            optimizer.param_groups[0]["lr"] = min(1.0, (self.trainer.global_step + 1) / 5)
            rates.append(optimizer.param_groups[0]["lr"])

    run = trainer(**OPTIONS)
    run.fit(WarmUp(), numbers(5, 1))
    assert rates == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert run.global_step == 5
