"""Behaviour 33: files that PyTorch Lightning wrote load without running their code, and training goes on from them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lite.errors import CheckpointError
from lite.trainer import LightningModule
from tests.trainer.modules import trainer

# Two epochs of three steps of Adam, by Lightning 2.6.6: Net(width=2, lr=0.05), with a StepLR.
FILE = Path(__file__).with_name("files") / "lightning_2_6.ckpt"


class Net(LightningModule):
    """The module that the file is of."""

    def __init__(self, width: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_behaviour_33_weights_and_hyperparameters_of_lightning_2_load() -> None:
    """load_from_checkpoint, with an override."""
    module = Net.load_from_checkpoint(FILE, lr=0.3)
    assert module.hparams == {"width": 2, "lr": 0.3}
    stored = torch.load(FILE, weights_only=True)["state_dict"]
    assert torch.equal(module.net.weight.detach(), stored["net.weight"])


def test_behaviour_33_training_goes_on_from_lightning_2() -> None:
    """Epoch, steps, optimizer and scheduler are taken over."""
    module = Net(2)
    run = trainer(max_epochs=3)
    data = torch.utils.data.DataLoader(torch.randn(6, 2), batch_size=2)
    with pytest.warns(UserWarning, match="states of callbacks that this Trainer doesn't have"):
        run.fit(module, data, ckpt_path=FILE)
    assert (run.current_epoch, run.global_step) == (3, 9)
    assert int(run.optimizers[0].state[module.net.weight]["step"]) == 9
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_behaviour_33_classes_of_older_files_are_read_as_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.x kept hyperparameters in an AttributeDict of its own; what would run code is refused."""
    name = "pytorch_lightning.utilities.parsing"
    for part in ("pytorch_lightning", "pytorch_lightning.utilities", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    old = type("AttributeDict", (dict,), {"__module__": name})
    sys.modules[name].AttributeDict = old
    content = {"state_dict": Net(4).state_dict(), "pytorch-lightning_version": "1.8.6", "epoch": 1, "global_step": 8}
    torch.save({**content, "hyper_parameters": old(width=4, lr=0.2)}, tmp_path / "old.ckpt")
    monkeypatch.undo()
    assert Net.load_from_checkpoint(tmp_path / "old.ckpt").hparams == {"width": 4, "lr": 0.2}
    torch.save({**content, "hyper_parameters": nn.Linear(1, 1)}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="more than plain data"):
        Net.load_from_checkpoint(tmp_path / "code.ckpt")
