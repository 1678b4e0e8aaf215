"""Names of checkpoints: metrics put into a template, and a number where a name is taken."""

from __future__ import annotations

import os
import re
from typing import Any

from lite.storage import is_url, locate

_FIELD = re.compile(r"\{([^:{}]+)(:[^{}]*)?\}")


def checkpoint_name(template: str, metrics: dict[str, Any], equals: str | None) -> str:
    """Put metrics into the template; one that is missing counts 0.

    Args:
        template: "{epoch}-{val_loss:.2f}" say.
        metrics: The values.
        equals: What stands between the inserted name and the value; None inserts no names. A "/" in an inserted name
            becomes "_", so that it makes no folder.

    Example:
        >>> checkpoint_name("x-{epoch}-{val/loss:.2f}", {"epoch": 3, "val/loss": 0.5}, "=")
        'x-epoch=3-val_loss=0.50'
    """

    def put_in(found: re.Match[str]) -> str:
        name, spec = found[1], (found[2] or "")[1:]
        value = metrics.get(name, 0)
        value = value.item() if hasattr(value, "item") else value
        text = format(value, spec)
        return text if equals is None else f"{name.replace('/', '_')}{equals}{text}"

    return _FIELD.sub(put_in, template)


def fields_of(template: str) -> set[str]:
    """The metrics that a template names.

    Example:
        >>> sorted(fields_of("x-{epoch}-{val/loss:.2f}"))
        ['epoch', 'val/loss']
    """
    return {found[1] for found in _FIELD.finditer(template)}


def free_name(path: str, suffix: str, first: int, own: str) -> str:
    """The path, with "-v1", "-v2", ... where something else than `own` is there already."""
    storage, target, _ = locate(path)
    if path == own or storage.kind(target) is None:
        return path
    stem = path.removesuffix(suffix)
    number = first
    while True:
        candidate = f"{stem}-v{number}{suffix}"
        if candidate == own or storage.kind(locate(candidate)[1]) is None:
            return candidate
        number += 1


def expanded(folder: str | None) -> str | None:
    """The folder's full path; a URL as it is."""
    return folder if folder is None or is_url(folder) else os.path.abspath(os.path.expanduser(folder))
