"""A run of validate, test or predict, from its arguments to its results, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lite.errors import ConfigError
from lite.trainer.checkpoints import contents
from lite.trainer.checkpoints.files import Checkpoints
from lite.trainer.data.sources import or_datamodule
from lite.trainer.interruption import Interruption
from lite.trainer.loops import EvaluationLoop
from lite.trainer.loops.evaluate import no_gradients
from lite.trainer.preparing import Preparing
from lite.trainer.run import check_module, running
from lite.trainer.state import RunningStage, TrainerFn


class Evaluating(Preparing, Checkpoints, Interruption):
    """The side of `Trainer` that evaluates by itself."""

    inference_mode: bool

    def _evaluate(
        self,
        loop: EvaluationLoop,
        fn: TrainerFn,
        model: Any,
        dataloaders: Any,
        ckpt_path: Any,
        verbose: bool,
        datamodule: Any,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        """One run of that loop: what was logged for each loader."""
        dataloaders, datamodule = or_datamodule(dataloaders, datamodule)
        if model is None:
            if self.module is None:
                raise ConfigError(f"trainer.{fn.value}() got no model, and there is none of a fit before it; pass one.")
            model, datamodule = self.module, datamodule if datamodule is not None else self.datamodule
            if ckpt_path is None and any(c.best_model_path for c in self.checkpoint_callbacks):
                ckpt_path = "best"
        check_module(self, model, fn.value)
        self._launch()
        results: list[dict[str, Any]] = []  # of a run that Ctrl-C ends in a notebook
        find = partial(self._begin_from, ckpt_path, fitting=False)
        with self._stop_signals(), running(self, fn, model, datamodule, find):
            checkpoint = self._read_checkpoint(weights_only)
            if checkpoint is not None:
                contents.restore_callbacks(self, checkpoint, fitting=False)
            self._log_graph()
            if checkpoint is not None:
                contents.restore_weights(self, checkpoint, str(self.ckpt_path))
            self._set_up(train=False)
            self._log_hyperparameters()
            data = self._eval_data[fn.value] = self._make_eval_data(fn.value, dataloaders)
            names = data.names
            self.state.stage = RunningStage(fn.value)
            results = loop.run(self, data, no_grad=no_gradients(self.inference_mode), look=self.heed_signal)
            self.heed_signal(now=True)
        if fn is TrainerFn.PREDICTING:
            return []
        found = [{name: float(value) for name, value in one.items()} for one in results]
        if verbose and results and self.is_global_zero:
            print_results(found, fn.value, names)
        return found


def print_results(results: Sequence[dict[str, float]], stage: str, names: Sequence[str] | None) -> None:
    """Print one table: a row for each metric, a column for each loader."""
    keys = list(dict.fromkeys(key for one in results for key in one))
    if not keys:
        return
    if len(results) == 1:
        heads = ["value"]
    else:
        heads = list(names) if names is not None else [f"loader {i}" for i in range(len(results))]
    width = max([len(stage) + 7, *(len(key) for key in keys)])
    columns = [max(len(head), 14) for head in heads]
    print(f"{stage + ' metric':<{width}}  " + "  ".join(f"{h:>{w}}" for h, w in zip(heads, columns, strict=True)))
    for key in keys:
        cells = [f"{one[key]:>{w}.7g}" if key in one else " " * w for one, w in zip(results, columns, strict=True)]
        print(f"{key:<{width}}  " + "  ".join(cells))
