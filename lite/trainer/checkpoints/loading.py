"""Making a module or a datamodule from a checkpoint: its hyperparameters, the user's overrides, its weights."""

from __future__ import annotations

import csv
import inspect
import json
import os
import warnings
from ast import literal_eval
from collections.abc import Mapping
from typing import Any

import torch

from lite.errors import CheckpointError, ConfigError, MissingExtraError
from lite.loading import restore_object
from lite.storage import locate
from lite.trainer.checkpoints.foreign import foreign_globals, read_checkpoint

_OLD_NAMES = ("hyper_parameters", "hparams", "module_arguments")


def load_module_from_checkpoint(
    cls: Any,
    path: str | os.PathLike[str],
    map_location: Any,
    hparams_file: str | os.PathLike[str] | None,
    strict: bool | None,
    weights_only: bool,
    overrides: dict[str, Any],
) -> Any:
    """See `LightningModule.load_from_checkpoint`."""
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if "state_dict" not in checkpoint:
        raise CheckpointError(
            f"checkpoint_path={str(path)!r} has no 'state_dict'; it has {list(checkpoint)!r:.200}. Weights alone are "
            "loaded by load_state_dict(torch.load(path, weights_only=True)) of a module that is made."
        )
    if hparams_file is not None:
        checkpoint["hyper_parameters"] = read_hparams(hparams_file)
    module = _make(cls, checkpoint, overrides)
    configure = getattr(module, "configure_model", None)
    if configure is not None:
        configure()
    module.on_load_checkpoint(checkpoint)
    wanted = module.strict_loading if strict is None else strict
    report = restore_object(module, checkpoint["state_dict"], "state_dict", strict=wanted)
    if report.missing or report.unexpected:
        warnings.warn(f"not everything in checkpoint_path={str(path)!r} was loaded: {report}", stacklevel=3)
    device = _device(map_location, path, weights_only=weights_only)
    return module if device is None else module.to(device)


def _device(map_location: Any, path: str | os.PathLike[str], *, weights_only: bool) -> Any:
    """Where the weights go by `map_location`, which may be as torch.load's: asked of the file's first tensor."""
    if map_location is None or isinstance(map_location, (str, int, torch.device)):
        return map_location
    if not isinstance(map_location, Mapping) and not callable(map_location):
        raise ConfigError(
            f"map_location={map_location!r} must be a device, a dict such as {{'cuda:1': 'cuda:0'}}, or a function of "
            "(storage, location)."
        )
    storage, place = _first_storage(path, weights_only=weights_only)
    if isinstance(map_location, Mapping):
        return map_location.get(place)
    found = map_location(storage, place)
    return None if found is None else found.device


def _first_storage(path: str | os.PathLike[str], *, weights_only: bool) -> tuple[Any, str]:
    """A storage on the CPU and the place that the file names for it; "cpu" where it is a directory."""
    found: list[tuple[Any, str]] = []

    def see(storage: Any, place: str) -> Any:
        found.append((storage, place))
        return storage

    files, target, _ = locate(path)
    if files.kind(target) == "file":
        with files.open(target) as file, foreign_globals():
            torch.load(file, map_location=see, weights_only=weights_only)
    return found[0] if found else (torch.empty(0).untyped_storage(), "cpu")


def load_datamodule_from_checkpoint(
    cls: Any,
    path: str | os.PathLike[str],
    hparams_file: str | os.PathLike[str] | None,
    weights_only: bool,
    overrides: dict[str, Any],
) -> Any:
    """See `LightningDataModule.load_from_checkpoint`."""
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if hparams_file is not None:
        checkpoint["datamodule_hyper_parameters"] = read_hparams(hparams_file)
    renamed = {
        "hyper_parameters": checkpoint.get("datamodule_hyper_parameters", {}),
        "hparams_name": checkpoint.get("datamodule_hparams_name"),
    }
    datamodule = _make(cls, renamed, overrides)
    state = checkpoint.get("datamodule", checkpoint.get(cls.__qualname__))
    if state is not None:
        datamodule.load_state_dict(state)
    return datamodule


def _make(cls: Any, checkpoint: Mapping[str, Any], overrides: dict[str, Any]) -> Any:
    """Call the class with the stored hyperparameters that it takes; the overrides win."""
    stored: dict[str, Any] = {}
    for name in _OLD_NAMES:
        if isinstance(checkpoint.get(name), Mapping):
            stored = dict(checkpoint[name])
            break
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    held_in: Any = checkpoint.get("hparams_name")
    if stored and isinstance(held_in, str) and held_in in parameters and held_in not in stored:
        from lite.trainer.hparams import AttributeDict

        return cls(**{held_in: AttributeDict({**stored, **overrides})})
    kept = {k: v for k, v in stored.items() if takes_any or k in parameters}
    arguments = {**kept, **overrides}
    try:
        return cls(**arguments)
    except TypeError as error:
        missing = [
            n
            for n, p in parameters.items()
            if n != "self"
            and p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and n not in arguments
        ]
        if not missing:
            raise
        raise TypeError(
            f"{cls.__name__} needs {', '.join(missing)}, which the checkpoint does not have; pass "
            f"load_from_checkpoint(path, {missing[0]}=...)."
        ) from error


def read_hparams(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Hyperparameters of a .json, .yaml or .csv file (columns key, value).

    Raises:
        ConfigError: It has none in that form.
    """
    text = os.fspath(path)
    if text.endswith((".yaml", ".yml")):
        try:
            import yaml  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingExtraError(f"hparams_file={text!r} needs PyYAML: pip install pyyaml") from error
        with open(path) as file:
            return dict(yaml.safe_load(file) or {})
    if text.endswith(".json"):
        with open(path) as file:
            found = json.load(file)
        if not isinstance(found, dict):
            raise ConfigError(f"hparams_file={text!r} has a {type(found).__name__}, no dict of hyperparameters.")
        return found
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        if not {"key", "value"} <= set(table.fieldnames or ()):
            raise ConfigError(
                f"hparams_file={text!r} is no .json and no .yaml, and not a table with the columns 'key' and 'value'."
            )
        rows = {row["key"]: row["value"] for row in table}
    return {key: _literal(value) for key, value in rows.items()}


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
