"""What a progress bar is drawn with: tqdm where it is installed, plain lines otherwise."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

_LINE_EVERY_S = 10.0


def make_bar(text: str, total: int | None, *, leave: bool) -> Any:
    """A bar of tqdm's, or plain lines.

    Args:
        text: What it begins with.
        total: Batches, or None.
        leave: Whether it stays when it is closed.
    """
    if importlib.util.find_spec("tqdm") is None:
        return PlainLines(text, total)
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

    return tqdm(desc=text, total=total, leave=leave, dynamic_ncols=True, file=sys.stdout)


def show(bar: Any, done: int, metrics: dict[str, Any]) -> None:
    """Draw so many batches, and those values."""
    bar.n = done
    bar.set_postfix({name: _short(value) for name, value in metrics.items()}, refresh=False)
    bar.refresh()


class PlainLines:
    """Progress in lines of their own, one in some seconds, and one at the end; with the part of tqdm's methods that a
    progress bar needs.

    Args:
        text: What they begin with.
        total: Batches, or None.
    """

    def __init__(self, text: str, total: int | None) -> None:
        self.desc, self.total, self.n = text, total, 0
        self._begun_s = self._shown_s = time.monotonic()
        self._line = self._values = ""

    def set_description(self, desc: str, refresh: bool = True) -> None:
        """Begin lines otherwise from now on."""
        self.desc = desc

    def set_postfix(self, values: dict[str, Any], refresh: bool = True) -> None:
        """What lines end with from now on."""
        self._values = "".join(f", {name}={value}" for name, value in values.items())

    def refresh(self) -> None:
        """Print the line, if the last one is old enough."""
        now = time.monotonic()
        rate = self.n / max(now - self._begun_s, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        self._line = f"{self.desc}: {self.n}{of} batches, {rate:.1f} batches/s{self._values}"
        if now - self._shown_s >= _LINE_EVERY_S:
            self._print()

    def _print(self) -> None:
        print(self._line, flush=True)
        self._shown_s, self._line = time.monotonic(), ""

    def close(self) -> None:
        """Print what has not been."""
        if self._line:
            self._print()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
