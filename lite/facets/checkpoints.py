"""Saving and loading, from the user's loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lite import collectives
from lite.checkpoint import manifest, per_rank
from lite.checkpoint.background import Background
from lite.errors import CheckpointError, ConfigError, choose
from lite.facets.base import Facet
from lite.first_rank import refuse_alone
from lite.sharded import gather, holds_parts
from lite.state import Filter, LoadReport, collect, sanitise

Path = str | os.PathLike[str]

_SAVED_ALONE = (
    "lite.save() was called",
    "Call it on all ranks, not under `if lite.is_global_zero:`; of a single file rank 0 does the writing.",
)


class Checkpoints(Facet):
    """The side of `Lite` that keeps what was reached."""

    _background: Background | None = None
    _load_report = LoadReport()

    # ---- saving

    def save(
        self,
        path: Path,
        state: Mapping[str, Any],
        filter: Filter | None = None,
        *,
        async_save: bool = False,
        busy: str = "wait",
        rng: bool = True,
    ) -> bool:
        """Write a checkpoint, whole or not at all. Collective: call on all ranks.

        A path with a suffix ("last.ckpt") is one file, which rank 0 writes and `torch.load(path, weights_only=True)`
        reads without `lite`; sharded tensors are put together for it, one at a time. A path without one ("last", or
        "last/") is a directory, of which every rank writes its part and `torch.distributed.checkpoint` reads the
        tensors. Either loads under every strategy and number of processes. URLs ("s3://...") go through fsspec. What
        was there before stays whole until the new checkpoint is.

        Args:
            path: The file or directory, the same on all ranks; folders are made.
            state: Names, the same on all ranks, and modules, optimizers, schedulers, Stateful objects or plain values.
            filter: For a name of `state`, a function of (key, value) that says which of its items are kept.
            async_save: Return when the state is copied, and write in the background. If that fails, the next `save`,
                `load`, `wait_for_save` or `teardown` raises it; Python ends only when the write has, and with exit code
                1 if nobody has been told of a failure.
            busy: What to do when the background save before this one is still writing: "wait" for it, or "skip" this
                one.
            rng: Whether every rank's random states (Python, numpy, torch, CUDA) are kept, to go on from at `load`.

        Returns:
            Whether it was (or with `async_save`: is being) saved; False when it was skipped. The same on all ranks.

        Raises:
            CheckpointError: (on all ranks) The checkpoint can't be written, or a value can't be stored; it names the
                key. Or the background save before this one has failed.
            UsageError: Another rank has gone on, or has ended, without this call.
        """
        self._require_connected("save")
        refuse_alone("lite.save")
        self._meet(*_SAVED_ALONE)
        busy = choose("busy", busy, ["wait", "skip"])
        before = self._background
        if before is not None:
            before.wait() if busy == "wait" else None
            is_busy = before.is_busy
            problem = before.take_error()
            if self._agree(problem, is_busy):  # before anything is exchanged
                return False
            before.settled = True
        with self.strategy.saving():
            return self._save(path, state, filter, async_save, rng)

    def _save(
        self,
        path: Path,
        state: Mapping[str, Any],
        filter: Filter | None,
        async_save: bool,
        rng: bool,
    ) -> bool:
        problem, is_folder, content = None, False, None
        try:
            is_folder, content = self._prepare(path, state, filter)
        except Exception as error:
            problem = error
        asked = {"path": str(os.fspath(path)), "state's names": sorted(state)} if problem is None else None
        self._agree(problem, False, asked)
        assert content is not None
        self._warn_of_open_windows(state)
        content[manifest.KEY] = self._manifest(content, state, rng)
        replicated = self._replicated(content, state)
        if not is_folder and self.world_size > 1:
            content = gather(self._with_all_layers(content, replicated), keep=self.is_global_zero)
        if async_save:
            content = self._staged(content, needed=is_folder or self.is_global_zero)
        write = self._writer(path, content, replicated, is_folder, async_save)
        if async_save:
            self._in_background().start(write)
            return True
        try:
            write()
        except Exception as error:
            problem = error
        if not is_folder:  # torch.distributed.checkpoint tells all ranks itself
            self._agree(problem, False)
        elif problem is not None:
            raise problem
        return True

    def wait_for_save(self) -> None:
        """Wait until the background save has been written. Collective: call on all ranks.

        Raises:
            CheckpointError: (on all ranks) It has failed.
        """
        self._require_connected("wait_for_save")
        if self._background is not None:
            self._background.wait()
            self._background.settled = True
            self._agree(self._background.take_error(), False)

    # ---- loading

    @property
    def load_report(self) -> LoadReport:
        """What did not fit in the last `load` or `load_raw` with strict=False: `.missing` and `.unexpected` keys."""
        return self._load_report

    def load(
        self,
        path: Path,
        state: dict[str, Any] | None = None,
        strict: bool = True,
        *,
        verify: bool = True,
        weights_only: bool = True,
        rng: bool = True,
    ) -> dict[str, Any]:
        """Read a checkpoint, file or directory, into the objects of `state`, in place. Every rank reads it.

        Call it on all ranks after a background save, for which it waits, and under LocalSGDStrategy. There ranks go on
        in the middle of a period where a model and its optimizer are loaded, both from the entries that they were saved
        in; else a model that is loaded begins a new period.

        Args:
            path: What `save` wrote, on any number of processes.
            state: As for `save`. Of plain values, lists, dicts, and tensors of the stored shape and dtype are changed
                in place, others replaced in it; each stays of its type, where there is one to tell it by: what a list
                holds that was empty comes as plain values. None returns everything, as plain values.
            strict: Whether names and model keys that are missing or unexpected are errors. With False they are warned
                of, and kept in `load_report`.
            verify: Whether checksums are compared before anything is read.
            weights_only: False lets the checkpoint run code, so do it only with one that you trust; it is logged.
            rng: Whether random number generators go on from their saved states. Where the data were divided into
                another number of parts, those of the first part go on from rank 0's, and the other ranks are seeded
                from it and their part.

        Returns:
            The entries that `state` doesn't ask for.

        Raises:
            CheckpointError: It is missing, damaged or holds code, or doesn't fit the objects; models, optimizers and
                loaders are looked at before any is changed.
            UsageError: A model is within `ema.swap`, at whose end its own weights would come back.
        """
        from lite.checkpoint.stored import resolve
        from lite.loading import restore
        from lite.swapped import refuse_swapped_models

        refuse_swapped_models("lite.load", (state or {}).values())
        lazily = state is not None and any(map(holds_parts, state.values()))
        loaded, about = self._read(path, verify, weights_only, lazily)
        if state is None:
            return loaded
        if lazily:
            loaded = {k: v if holds_parts(state.get(k)) else resolve(v) for k, v in loaded.items()}
        source, part = self._counterpart(about)
        per_rank.pick(loaded, state, source)
        kept = about.get("strategy", {})
        states = kept["states"] if kept.get("name") == self.strategy.name else []
        go_on = self.strategy.loading(states, state, loaded)
        rest, report = restore(state, loaded, strict=strict)
        self._report(path, report)
        go_on()
        per_rank.restore_buffers(about.get("buffers", {}), state, source)
        if "precision" in about:
            self.precision.load_state_dict(about["precision"])
        if rng and about.get("rng"):
            moment = per_rank.restore_random_state(about["rng"], source, part)
            for value in state.values():
                if hasattr(value, "go_on_under"):
                    value.go_on_under(moment)
        return rest

    def load_raw(
        self, path: Path, obj: Any, strict: bool = True, *, verify: bool = True, weights_only: bool = True
    ) -> None:
        """Read a plain state dict, such as `torch.save(model.state_dict(), path)` writes, into one object.

        Args:
            path: The file, or a directory of torch.distributed.checkpoint.
            obj: A module, raw or set up, or anything else with `load_state_dict`.
            strict: As for `load`.
            verify: As for `load`.
            weights_only: As for `load`.

        Raises:
            CheckpointError: It can't be read, or doesn't fit.
            UsageError: As for `load`.
        """
        from lite.loading import restore_object
        from lite.swapped import refuse_swapped_models

        if not hasattr(obj, "load_state_dict"):
            raise ConfigError(f"load_raw got a {type(obj).__name__}, which has no load_state_dict; pass a module, say.")
        refuse_swapped_models("lite.load_raw", [obj])
        loaded, about = self._read(path, verify, weights_only, holds_parts(obj))
        if about:
            raise CheckpointError(
                f"path={str(path)!r} is a checkpoint of several objects ({', '.join(map(repr, loaded))}); use "
                "lite.load(path, {'name': object}, strict=False)."
            )
        name = type(obj).__name__
        go_on = self.strategy.loading([], {name: obj}, {name: loaded})
        self._report(path, restore_object(obj, loaded, name, strict=strict))
        go_on()

    # ---- handing on

    def export(self, model: nn.Module, path: Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write a model's weights as safetensors, in shards with an index as Hugging Face's are.

        Collective: call on all ranks; rank 0 writes. Needs the extra: pip install lite[safetensors].

        Args:
            model: A module, raw or set up.
            path: A directory, which gets `model.safetensors`, or shards `model-00001-of-0000N.safetensors` and
                `model.safetensors.index.json`; or one file that ends in ".safetensors".
            max_shard_size: Bytes per shard, as a number or "500MB", "5GB".

        Raises:
            MissingExtraError: (on all ranks) safetensors is not installed.
            CheckpointError: (on all ranks) It can't be written.
        """
        from lite.checkpoint.export import export_safetensors
        from lite.state import module_state

        self._require_connected("export")
        problem: Exception | None = None
        try:
            weights = self._with_all_layers({"model": module_state(model)}, ["model"])["model"]
            weights = gather(weights, keep=self.is_global_zero)
            if self.is_global_zero:
                export_safetensors(weights, path, max_shard_size=max_shard_size)
        except Exception as error:
            problem = error
        self._agree(problem, False)

    # ---- pieces

    def _counterpart(self, about: Mapping[str, Any]) -> tuple[int | None, int]:
        """The rank of that checkpoint whose place this one takes, if there is one; and this rank's part of the data."""
        now = self.strategy.data_parts(self.world_size)
        num_saved = about.get("world_size", 1)
        # Files from before there was that entry went by ranks.
        saved = about.get("data_parts", now if num_saved == self.world_size else range(num_saved))
        return per_rank.counterpart(saved, now, self.global_rank), now[self.global_rank]

    def _warn_of_open_windows(self, state: Mapping[str, Any]) -> None:
        held = {id(part) for value in state.values() for part in (value, *getattr(value, "windows", ()))}
        if any(window.is_open and id(window) not in held for window, *_ in self._windows):
            warnings.warn(
                "lite.save came within an accumulation window, whose gradients are not in the checkpoint: a run that "
                "goes on from it begins the window anew. Save when window.ready, or put the window into the state.",
                stacklevel=4,
            )

    def _manifest(self, content: dict[str, Any], state: Mapping[str, Any], rng: bool) -> dict[str, Any]:
        """What a checkpoint holds besides the user's state, whose parts of each rank are put together. Collective."""
        entries: dict[str, Any] = {"precision": self.precision.state_dict()}
        entries["rng"] = per_rank.gather(content, state, rng=rng)
        own = self.strategy.own_state(state, content)
        if own is not None:
            states = collectives.all_gather_objects(own)
            entries["strategy"] = {"name": self.strategy.name, "states": states}
        if self.world_size > 1:
            entries["data_parts"] = self.strategy.data_parts(self.world_size)
            entries["buffers"] = per_rank.gather_buffers(content, state)
        return manifest.compose(self.world_size, {k: sanitise(v, manifest.KEY) for k, v in entries.items() if v})

    def _prepare(self, path: Path, state: Mapping[str, Any], filter: Filter | None) -> tuple[bool, dict[str, Any]]:
        from lite.checkpoint.file import check_is_no_folder
        from lite.storage import locate

        is_folder = locate(path)[2]
        if not is_folder:
            check_is_no_folder(path)
        content = collect(state, filter)
        manifest.check_names(content)
        return is_folder, content

    def _replicated(self, content: dict[str, Any], state: Mapping[str, Any]) -> list[str]:
        """The names of what is the same on every rank, or lies in parts on all. Collective where layers are divided."""
        names = [name for name in content if isinstance(state.get(name), (nn.Module, Optimizer))]
        if self.strategy.distributes_layers:
            from lite.elsewhere import names_of_divided

            names += [name for name in names_of_divided(content) if name not in names]
        return names

    def _with_all_layers(self, content: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """On rank 0, with the layers of other ranks in what has one of the names. Collective."""
        if not self.strategy.distributes_layers:
            return content
        from lite.elsewhere import fetch

        return {**content, **fetch({name: content[name] for name in names}, self._device)}

    def _staged(self, content: dict[str, Any], *, needed: bool) -> dict[str, Any]:
        """A copy of the content where it is needed; a rank that has no memory for it tells all. Collective."""
        from lite.checkpoint.staging import Staging

        problem: Exception | None = None
        try:
            if needed:
                staging = self._in_background().keep.setdefault("staging", Staging())
                content = staging.stage(content)
        except Exception as error:
            problem = error
        self._agree(problem, False)
        return content

    def _writer(
        self, path: Path, content: dict[str, Any], replicated: list[str], is_folder: bool, async_save: bool
    ) -> Callable[[], None]:
        if not is_folder:
            from lite.checkpoint.file import save_file

            return (lambda: save_file(path, content)) if self.is_global_zero else (lambda: None)
        from lite.checkpoint.directory_save import save_directory

        group = None
        if async_save and self.world_size > 1:
            # Training's own group is busy with gradients meanwhile.
            keep = self._in_background().keep
            if "group" not in keep:
                keep["group"] = collectives.new_cpu_group()
            group = keep["group"]
        return lambda: save_directory(path, content, replicated=replicated, group=group)

    def _in_background(self) -> Background:
        if self._background is None:
            self._background = Background()
        return self._background

    def _agree(self, problem: BaseException | None, is_busy: bool, asked: dict[str, Any] | None = None) -> bool:
        """Raise on all ranks what is wrong on one, or asked differently; return whether one is busy. Collective."""
        said = None if problem is None else f"{type(problem).__name__}: {problem}"
        answers = collectives.all_gather_objects((said, is_busy, asked))
        if problem is not None:
            raise problem
        for rank, (text, _, _) in enumerate(answers):
            if text is not None:
                raise CheckpointError(f"rank {rank} failed: {text}")
        for rank, (_, _, theirs) in enumerate(answers):
            for what, first in (answers[0][2] or {}).items():
                if theirs is not None and theirs[what] != first:
                    raise CheckpointError(
                        f"{what} must be the same on all ranks, but on rank {rank} it is {theirs[what]!r} and on rank "
                        f"0 {first!r}; lite.broadcast gives all ranks rank 0's."
                    )
        return any(busy for _, busy, _ in answers)

    def _read(
        self, path: Path, verify: bool, weights_only: bool, lazily: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        from lite.checkpoint.reading import read

        if self._background is not None and not self._background.settled:
            self.wait_for_save()
        return read(path, verify=verify, weights_only=weights_only, lazily=lazily)

    def _report(self, path: Path, report: LoadReport) -> None:
        self._load_report = report
        if report.missing or report.unexpected:
            warnings.warn(f"not everything in path={str(path)!r} was loaded: {report}", stacklevel=3)

    def _finish_saves(self) -> None:
        """Wait for this rank's background save, give its group back and raise its error; what `teardown` does."""
        if self._background is not None:
            self._background.wait()
            error = self._background.take_error()
            if "group" in self._background.keep:
                collectives.destroy_cpu_groups(self._background.keep["group"])
            self._background = None
            if error is not None:
                raise error
