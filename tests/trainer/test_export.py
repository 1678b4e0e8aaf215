"""A LightningModule for other runtimes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite.errors import ConfigError
from lite.trainer import LightningModule
from tests.trainer.modules import numbers, trainer


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch.float()).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("fitted", [False, True])
def test_modules_become_torchscript_and_programs(fitted: bool, tmp_path: Path) -> None:
    """Before and after a fit; a scripted one computes in evaluation mode, and the module keeps its own."""
    module, x = Plain(), torch.ones(3, 4)
    if fitted:
        trainer().fit(module, numbers())
    expected = module.net[0](x)
    module.train()
    for method in ({}, {"method": "trace", "example_inputs": x}):
        module.to_torchscript(tmp_path / "x.pt", **method)
        assert torch.equal(torch.jit.load(tmp_path / "x.pt")(x), expected)
    assert module.training
    with pytest.raises(ConfigError, match="Plain has no example_input_array"):
        module.to_torchscript(method="trace")
    with pytest.raises(ConfigError, match="method='onnx'"):
        module.to_torchscript(method="onnx")
    module.example_input_array = x
    assert torch.equal(module.to_torchscript(method="trace")(x), expected)
    assert torch.equal(torch.export.export(module.eval(), (x,)).module()(x), expected)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
def test_modules_become_onnx(tmp_path: Path) -> None:
    """By torch's own exporter."""
    module = Plain()
    module.to_onnx(tmp_path / "x.onnx", torch.ones(3, 4))
    assert (tmp_path / "x.onnx").stat().st_size > 0
