"""Validation and test.

the model into evaluation mode; start hooks
for each loader, for each batch: start hook; step; end hook
epoch-end hooks; the metrics; end hooks; the model back into its modes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch

from lite.errors import ConfigError
from lite.trainer.data.combined import CombinedLoader, where_to_go_on
from lite.trainer.data.counting import INFINITE, length
from lite.trainer.data.stage import StageData
from lite.trainer.hooks import overrides
from lite.trainer.logging.metric_objects import unchanged_metrics
from lite.trainer.loops.calling import signature_of
from lite.trainer.module import LightningModule
from lite.trainer.old import OldHooks, find_old_hooks

_HOOKS = {"validate": "validation", "test": "test", "predict": "predict"}


class EvaluationLoop:
    """Evaluates on the loaders of one stage, by itself or within training.

    Args:
        stage: "validate" or "test".

    Attributes:
        loader, batch: The cursor: the loader, and how many of its batches are done.
        running: It is under way.
        restoring: It goes on with an evaluation that was interrupted.
        begun: By hook, whose methods have begun: those of the start and the end.
        opened: A loader has been begun.
        under_way: A batch has been given out whose step is not done.
        settled: Of the newest batch all is done: its end hooks, its row.
        through: All loaders are done, and the epoch's end is not.
        seen: By loader, the batches of evaluations that are over: where the values of single batches lie on the x axis.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.loader = self.batch = 0
        self.running = self.restoring = False
        self.begun: dict[str, list[str]] = {}
        self.opened = self.under_way = self.through = False
        self.settled = True
        self.seen: dict[int, int] = {}
        self.loader_state: Any = None
        self._data: StageData | None = None
        self._old: OldHooks | None = None

    def run(
        self,
        trainer: Any,
        data: StageData,
        *,
        no_grad: Callable[[], AbstractContextManager[Any]],
        go_on: Callable[[], None] | None = None,
        look: Callable[..., bool] | None = None,
    ) -> list[dict[str, Any]]:
        """Evaluate all batches that count.

        Args:
            trainer: Whose run it is.
            data: The loaders.
            no_grad: The context without gradients.
            go_on: Called as an interrupted evaluation is about to go on.
            look: Called after each batch, and as look(now=True) after the last one, where ranks may have had different
                numbers of them; true ends the evaluation, which can be gone on with.

        Returns:
            For each loader what was logged.
        """
        if data.num_batches == 0:
            return []
        metrics, word = trainer.metrics, _HOOKS[self.stage]
        metrics.take_loaders(data)
        self._data = data
        resumed, self.restoring = self.restoring, False
        self.under_way = False
        if not resumed:
            self.loader, self.batch, self.begun = 0, 0, {}
            self.opened, self.settled, self.through = False, True, False
            trainer.lite.sync_buffers()
        end = f"on_{word}_end"
        with evaluating(trainer, word), no_grad():
            if go_on is not None and resumed and (end in self.begun or self.through or not self.opened):
                go_on()
            results: list[dict[str, Any]] = []
            if end not in self.begun:
                results = self._run_loaders(trainer, data, go_on if resumed else None, look)
            if not self.running:
                self._call(trainer, end)
        if not self.running:
            self.begun = {}
        return results

    def _run_loaders(
        self,
        trainer: Any,
        data: StageData,
        go_on: Callable[[], None] | None,
        look: Callable[..., bool] | None,
    ) -> list[dict[str, Any]]:
        """Evaluate all loaders; for each what was logged. One that was broken off is `running` still."""
        metrics, word = trainer.metrics, _HOOKS[self.stage]
        self.running = True
        self._old = find_old_hooks(trainer.module, word)
        if self._old is not None and (self.loader or self.batch):
            self._old.tell_of_outputs_before()
        self._call(trainer, f"on_{word}_start")
        self._call(trainer, f"on_{word}_epoch_start")
        first = self.loader
        for index in range(first, 0 if self.through else len(data.loaders)):
            if index > first:
                self.loader, self.batch = index, 0
            if self._run_loader(trainer, index, data, go_on if index == first else None, look):
                return []
        if look is not None and look(now=True):
            return []
        self.through = True
        metrics.end_batches()
        if self._old is not None or getattr(trainer.hooks, f"on_{word}_epoch_end"):
            metrics.show(self.stage)
        if self._old is not None:
            metrics.at(metrics.place(self.stage, f"on_{word}_epoch_end"))
            self._old.end()
        self._call(trainer, f"on_{word}_epoch_end")
        results: list[dict[str, Any]]
        row, results = metrics.finish(self.stage, len(data.loaders))
        trainer.write_row(row, self.stage)
        self.running = self.through = False
        self._data = None
        return results

    def _run_loader(
        self,
        trainer: Any,
        index: int,
        data: StageData,
        go_on: Callable[[], None] | None,
        look: Callable[..., bool] | None,
    ) -> bool:
        """Evaluate one loader; whether it was broken off."""
        hooks, metrics, word = trainer.hooks, trainer.metrics, _HOOKS[self.stage]
        on_start, on_end = getattr(hooks, f"on_{word}_batch_start"), getattr(hooks, f"on_{word}_batch_end")
        name = f"{word}_step"
        if self.stage != "predict" and not overrides(trainer.module, name, LightningModule):
            raise ConfigError(f"{type(trainer.module).__name__} has no {name}; define it to {self.stage}.")
        step, old = eval_step_caller(getattr(trainer.module, name), index, len(data.loaders)), self._old
        if trainer.wrap_hook is not None:
            step = trainer.wrap_hook(name, trainer.module, step)
        if old is not None:
            step = old.around(step)
        stage, place = self.stage, metrics.place
        in_start, in_end = place(stage, f"on_{word}_batch_start", index), place(stage, f"on_{word}_batch_end", index)
        in_step = place(stage, name, index)
        move, real = data.move, trainer.lite.real_samples if trainer.world_size > 1 else None
        writes_steps = trainer.logs_eval_steps(stage)
        done, seen = self.batch, self.seen.get(index, 0)
        if writes_steps and not self.settled:
            trainer.write_eval_step(stage, seen + done - 1)
        self.settled = True
        for batch in self._open(data.loaders[index], data.limits[index], done, go_on):
            if move is not None:
                batch = move(batch, index)
            self.under_way = True
            metrics.begin_batch(batch, in_step)
            if real is not None:
                metrics.filler = real() == 0
            if on_start:
                metrics.at(in_start)
                for hook in on_start:
                    hook(batch, done, index)
                metrics.at(in_step)
            if metrics.filler:
                with unchanged_metrics(trainer.module):
                    outputs = step(batch, done)
            else:
                outputs = step(batch, done)
            done += 1
            self.batch = done
            self.under_way = self.settled = False
            if on_end:
                metrics.at(in_end)
                for hook in on_end:
                    hook(outputs, batch, done - 1, index)
            if writes_steps:
                trainer.write_eval_step(stage, seen + done - 1)
            self.settled = True
            self.take(outputs, index, trainer)
            if old is not None and not metrics.filler:
                old.keep(outputs, index)
            if look is not None and look():
                return True
        self.seen[index] = seen + done
        return False

    def take(self, outputs: Any, index: int, trainer: Any) -> None:
        """A batch of loader `index` is done."""

    def _open(self, loader: Any, limit: float, done: int, go_on: Callable[[], None] | None) -> Iterator[Any]:
        if self.loader_state is not None:
            loader.load_state_dict(self.loader_state)
        self.loader_state = None
        batches = iter(loader)
        if isinstance(loader, CombinedLoader):
            batches = (batch for batch, _, _ in batches)
        self.opened = True
        if done and not hasattr(loader, "load_state_dict"):
            next(islice(batches, done, done), None)
        if go_on is not None:
            go_on()
        return islice(batches, int(limit - done)) if limit < INFINITE and length(loader) != limit else batches

    def _call(self, trainer: Any, name: str) -> None:
        trainer.metrics.at(trainer.metrics.place(self.stage, name))
        trainer.hooks.call_rest(name, self.begun.setdefault(name, []))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and the position in the loader that is under way; plain values of this rank."""
        state: dict[str, Any] = {"running": self.running, "loader": self.loader, "batch": self.batch, "position": None}
        state["begun"] = {name: list(owners) for name, owners in self.begun.items()}
        state.update(opened=self.opened, seen=dict(self.seen), settled=self.settled, through=self.through)
        if self.running and not self.through and self._data is not None and (self.batch or self.under_way):
            loader = self._data.loaders[self.loader]
            state["position"] = where_to_go_on(loader, self.under_way) if hasattr(loader, "state_dict") else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there at the next `run`."""
        self.begun, self.opened, self.seen = state["begun"], state["opened"], dict(state["seen"])
        self.settled, self.through = state.get("settled", True), state.get("through", False)
        self.restoring = state["running"] or bool(self.begun)
        if state["running"]:  # otherwise its loaders are through, and its end hooks alone are left
            self.loader, self.batch, self.loader_state = state["loader"], state["batch"], state["position"]


def eval_step_caller(method: Callable[..., Any], index: int, num_loaders: int) -> Callable[[Any, int], Any]:
    """An evaluation step as a function of (batch, batch_idx); `dataloader_idx` is given where the method has it."""
    names, most, takes_any = signature_of(method)
    if "dataloader_idx" in names:
        return lambda batch, batch_idx: method(batch, batch_idx, dataloader_idx=index)
    if num_loaders > 1 and "batch_idx" in names and not takes_any:
        raise ConfigError(
            f"{method.__name__} gets batches of {num_loaders} loaders and has no dataloader_idx; write "
            f"def {method.__name__}(self, batch, batch_idx, dataloader_idx=0)."
        )
    return method if most > 1 else lambda batch, batch_idx: method(batch)


@contextmanager
def evaluating(trainer: Any, word: str) -> Iterator[None]:
    """The model evaluates; afterwards every submodule has its own mode back."""
    module, hooks = trainer.module, trainer.hooks
    to_eval, to_train = getattr(hooks, f"on_{word}_model_eval"), getattr(hooks, f"on_{word}_model_train")
    modes = {part: part.training for part in module.modules()}
    if to_eval:
        hooks.call(f"on_{word}_model_eval")
    else:
        module.eval()
    try:
        yield
    finally:
        if to_train:
            hooks.call(f"on_{word}_model_train")
        else:
            for part, mode in modes.items():
                part.training = mode


def no_gradients(inference_mode: bool) -> Callable[[], AbstractContextManager[Any]]:
    """The context of evaluation."""
    return torch.inference_mode if inference_mode else torch.no_grad
