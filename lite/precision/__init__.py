"""The precisions by name; those beyond full precision are imported when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lite.precision.base import Precision

if TYPE_CHECKING:
    from lite.precision.mixed import MixedPrecision
    from lite.precision.true import TruePrecision

__all__ = ["PRECISIONS", "PRECISION_ALIASES", "MixedPrecision", "Precision", "TruePrecision", "make_precision"]

PRECISIONS = ("64-true", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
PRECISION_ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_TRUE = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}


def make_precision(name: str, device_type: str) -> Precision:
    """The precision with that (settled) name for that kind of device."""
    if name == "32-true":
        return Precision()
    from lite.precision.mixed import MixedPrecision
    from lite.precision.true import TruePrecision

    return TruePrecision(name, _TRUE[name]) if name in _TRUE else MixedPrecision(name, device_type)


def __getattr__(name: str) -> Any:
    if name == "MixedPrecision":
        from lite.precision.mixed import MixedPrecision as found
    elif name == "TruePrecision":
        from lite.precision.true import TruePrecision as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
