"""The precisions by name; those beyond full precision are imported when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lite.precision.base import Precision

if TYPE_CHECKING:
    from lite.precision.fp8 import Float8Precision
    from lite.precision.frozen import FrozenPrecision
    from lite.precision.mixed import MixedPrecision
    from lite.precision.transformer_engine import TransformerEnginePrecision
    from lite.precision.true import TruePrecision

__all__ = [
    "EXTRA_PRECISIONS",
    "PRECISIONS",
    "PRECISION_ALIASES",
    "Float8Precision",
    "FrozenPrecision",
    "MixedPrecision",
    "Precision",
    "TransformerEnginePrecision",
    "TruePrecision",
    "make_precision",
]

PRECISIONS = ("64-true", "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
EXTRA_PRECISIONS = ("fp8", "transformer-engine", "int8-frozen", "nf4-frozen")  # which need an extra
PRECISION_ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_TRUE = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}


def make_precision(name: str, device_type: str) -> Precision:
    """The precision with that (settled) name for that kind of device.

    Raises:
        MissingExtraError: What it is made with is not installed.
    """
    if name == "32-true":
        return Precision()
    if name == "fp8":
        from lite.precision.fp8 import Float8Precision

        return Float8Precision(device_type)
    if name == "transformer-engine":
        from lite.precision.transformer_engine import TransformerEnginePrecision

        return TransformerEnginePrecision(device_type)
    if name in EXTRA_PRECISIONS:
        from lite.precision.frozen import FrozenPrecision

        return FrozenPrecision(name)
    from lite.precision.mixed import MixedPrecision
    from lite.precision.true import TruePrecision

    return TruePrecision(name, _TRUE[name]) if name in _TRUE else MixedPrecision(name, device_type)


def __getattr__(name: str) -> Any:
    if name == "MixedPrecision":
        from lite.precision.mixed import MixedPrecision as found
    elif name == "TruePrecision":
        from lite.precision.true import TruePrecision as found  # type: ignore[assignment]
    elif name == "Float8Precision":
        from lite.precision.fp8 import Float8Precision as found  # type: ignore[assignment]
    elif name == "TransformerEnginePrecision":
        from lite.precision.transformer_engine import TransformerEnginePrecision as found  # type: ignore[assignment]
    elif name == "FrozenPrecision":
        from lite.precision.frozen import FrozenPrecision as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
