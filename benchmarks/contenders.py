"""One training step by each contender: raw PyTorch, lite, and the peers where they are installed.

Every contender gets its own model and optimizer from the same seed, and does the same: forward, loss, backward, step.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor]
Train = Callable[[Iterator[Batch]], None]


def raw(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """Plain PyTorch; in bf16-mixed the forward under autocast and its output in float32, as the others do it."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(batches: Iterator[Batch]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            if precision == "bf16-mixed":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = model(x)
                loss = F.cross_entropy(out.float(), y)
            else:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    return train, loader


def lite(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """lite."""
    from lite import Lite

    lite = Lite(accelerator="cpu", precision=precision)
    model = make()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return _loop(model, optimizer, lite.backward), lite.setup_dataloaders(loader) if loader is not None else None


def trainer(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """lite's Trainer, bare: nothing but training; with a loader it trains epoch by epoch."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return _train_with(make, precision, loader, 0, **off)


def trainer_defaults(
    make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None
) -> tuple[Train, Any]:
    """lite's Trainer with progress bar, CSV logger and one log per step."""
    return _train_with(make, precision, loader, 1, logger=_csv(), enable_checkpointing=False)


def trainer_20_logs(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """lite's bare Trainer with twenty logs per step."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return _train_with(make, precision, loader, 20, **off)


class Fed:
    """Batches that the benchmark hands in."""

    def __init__(self) -> None:
        self.batches: Any = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def _csv() -> Any:
    from lite.loggers import CSVLogger

    return CSVLogger(tempfile.mkdtemp())


def _train_with(
    make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None, logs: int, **options: Any
) -> tuple[Train, Any]:
    """One fit that is driven from outside, so that its beginning and end are not among the steps."""
    from lite.trainer import LightningModule, Trainer

    module = _module(LightningModule, make, [f"metric {i}" for i in range(logs)])
    fed = Fed()
    run = Trainer(accelerator="cpu", precision=precision, max_epochs=-1, **options)
    source: Any = fed if loader is None else loader
    events = run.steps(module, source, events=("epoch",))

    def train(batches: Any) -> None:
        fed.batches = batches
        with redirect_stdout(io.StringIO()):
            next(events)

    return train, loader


def lightning(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """Lightning's Trainer, bare."""
    return _train_with_lightning(make, precision, loader, 0, logger=False, enable_progress_bar=False)


def lightning_defaults(
    make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None
) -> tuple[Train, Any]:
    """Lightning's Trainer with progress bar, CSV logger and one log per step."""
    from lightning.pytorch.loggers import CSVLogger

    return _train_with_lightning(make, precision, loader, 1, logger=CSVLogger(tempfile.mkdtemp()))


def lightning_20_logs(
    make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None
) -> tuple[Train, Any]:
    """Lightning's bare Trainer with twenty logs per step."""
    return _train_with_lightning(make, precision, loader, 20, logger=False, enable_progress_bar=False)


def _train_with_lightning(
    make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None, logs: int, **options: Any
) -> tuple[Train, Any]:
    """One fit in a thread of its own, which waits at the end of each epoch until it is asked for the next one."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    ready, go, done = (threading.Semaphore(0) for _ in range(3))

    class Turns(Callback):
        def on_train_epoch_start(self, *unused: Any) -> None:
            ready.release()
            go.acquire()

        def on_train_epoch_end(self, *unused: Any) -> None:
            done.release()

    fed = Fed()
    off = {"enable_checkpointing": False, "enable_model_summary": False}
    run = Trainer(
        accelerator="cpu", devices=1, precision=precision, max_epochs=-1, callbacks=[Turns()], **off, **options
    )
    module = _module(LightningModule, make, [f"metric {i}" for i in range(logs)])
    source: Any = fed if loader is None else loader
    with redirect_stdout(io.StringIO()):  # where its progress bar writes from now on
        threading.Thread(target=run.fit, args=(module, source), daemon=True).start()
        ready.acquire()

    def train(batches: Any) -> None:
        fed.batches = batches
        go.release()
        done.acquire()

    return train, loader


def _module(base: Any, make: Callable[[], nn.Module], names: list[str]) -> Any:
    """The same module for either Trainer, from its LightningModule; each step logs the loss under each name."""

    class Module(base):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            for name in names:
                self.log(name, loss, prog_bar=True)
            return loss

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            for name in names:
                self.log(name, loss)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def evaluate_raw(make: Callable[[], nn.Module], loader: DataLoader[Any]) -> Callable[[], Any]:
    """A plain loop that computes each batch's loss."""
    model = make().eval()

    def evaluate() -> None:
        with torch.inference_mode():
            for x, y in loader:
                F.cross_entropy(model(x), y)

    return evaluate


def evaluate_trainer(make: Callable[[], nn.Module], loader: DataLoader[Any], logs: bool) -> Callable[[], Any]:
    """lite's Trainer.validate, whose beginning and end are among the batches; with one epoch mean, or none."""
    from lite.trainer import LightningModule, Trainer

    off = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(accelerator="cpu", max_epochs=1, logger=False, **off)
    module = _module(LightningModule, make, ["val_loss"] if logs else [])
    return lambda: run.validate(module, loader, verbose=False)


def evaluate_lightning(make: Callable[[], nn.Module], loader: DataLoader[Any], logs: bool) -> Callable[[], Any]:
    """The same by Lightning's Trainer."""
    from lightning.pytorch import LightningModule, Trainer

    off = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, **off)
    module = _module(LightningModule, make, ["val_loss"] if logs else [])
    return lambda: run.validate(module, loader, verbose=False)


def fabric(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    model = make()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return _loop(model, optimizer, fabric.backward), fabric.setup_dataloaders(loader) if loader is not None else None


def accelerate(make: Callable[[], nn.Module], precision: str, loader: DataLoader[Any] | None) -> tuple[Train, Any]:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16-mixed" else "no")
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    return _loop(model, optimizer, accelerator.backward), accelerator.prepare(loader) if loader is not None else None


def _loop(model: Any, optimizer: Any, backward: Callable[[Tensor], Any]) -> Train:
    def train(batches: Iterator[Batch]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)  # kept until the next one, as raw's: freeing a graph takes time, too
            backward(loss)
            optimizer.step()

    return train


def installed() -> dict[str, Callable[..., tuple[Train, Any]]]:
    """Every contender that can run here; "raw again" shows the noise."""
    found: dict[str, Callable[..., tuple[Train, Any]]] = {"raw": raw, "raw again": raw, "lite": lite}
    found |= {"trainer": trainer, "defaults": trainer_defaults, "20 logs": trainer_20_logs}
    if importlib.util.find_spec("lightning") is not None:
        found["fabric"] = fabric
        found |= {"L trainer": lightning, "L defaults": lightning_defaults, "L 20 logs": lightning_20_logs}
    if importlib.util.find_spec("accelerate") is not None:
        found["accelerate"] = accelerate
    return found


def quiet() -> Any:
    """The peers' advice is no part of the table."""
    warnings.simplefilter("ignore")
    return nullcontext()
