"""Starts the processes of one machine through torch's elastic_launch, the machinery behind torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from lite.errors import ConfigError, LaunchError, PeerError, choose
from lite.launchers.base import Launcher

T = TypeVar("T")

START_METHODS = ("spawn", "fork", "forkserver")


class ElasticLauncher(Launcher):
    """Runs a function in `num_processes` new processes of this machine; when one fails, all are ended.

    Args:
        num_processes: How many.
        start_method: "spawn" (a fresh interpreter each), "forkserver", or "fork" (notebooks; each process computes with
            one thread, since threads of this process don't survive a fork).

    Source: https://pytorch.org/docs/stable/elastic/run.html
    """

    def __init__(self, num_processes: int, start_method: str = "spawn") -> None:
        self.num_processes = num_processes
        self.start_method = choose("start_method", start_method, START_METHODS)

    def launch(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run `fn(*args, **kwargs)` in every process and return rank 0's value.

        Raises:
            ConfigError: The function or an argument can't reach another process.
            LaunchError: A process failed; the message holds the traceback of the one that failed first.
        """
        self._check_main()
        if self.start_method == "fork":
            _check_fork()
        else:
            _check_reachable((fn, *args, *kwargs.values()))
        with tempfile.TemporaryDirectory(prefix="lite-launch-") as folder:
            results = self._run(_work, (folder, self.start_method, fn, args, kwargs), Path(folder))
        value: T = pickle.loads(results[0])
        return value

    def launch_script(self) -> NoReturn:
        """Run `sys.argv` again in every process, as torchrun would, then exit with 0.

        Raises:
            ConfigError: There is no script to run again: this is an interactive session.
            LaunchError: A process failed; its own output says why.
        """
        main = sys.modules["__main__"]
        if getattr(main, "__file__", None) is None:
            raise ConfigError(
                "launch() has no script to run again in an interactive session; pass a function: lite.launch(fn)."
            )
        spec = getattr(main, "__spec__", None)
        script = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [sys.argv[0]]
        sys.stdout.flush()
        self._run(sys.executable, ("-u", *script, *sys.argv[1:]), None)
        raise SystemExit(0)

    def _run(self, entry: Callable[..., Any] | str, args: tuple[Any, ...], folder: Path | None) -> dict[int, Any]:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self.num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method=self.start_method,
        )
        try:
            with _children_environment():
                return dict(elastic_launch(config, entry)(*args))
        except ChildFailedError as error:
            raise LaunchError(_first_failure(folder) or _describe(error)) from None
        except SignalException as error:
            raise KeyboardInterrupt(f"ended by signal {error.sigval}") from None

    def _check_main(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise ConfigError(
                "lite.launch was reached while a started process imports the main script; put the call under "
                "`if __name__ == '__main__':`, or start the script with torchrun."
            )


def in_notebook() -> bool:
    """Whether this is an IPython session, whose functions only a fork can carry over."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


def _work(folder: str, start_method: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    """What each process does; a traceback is left where the parent finds it."""
    if start_method == "fork":
        torch.set_num_threads(1)
    rank = os.environ["RANK"]
    try:
        value = fn(*args, **kwargs)
        try:
            return pickle.dumps(value if rank == "0" else None)
        except Exception as error:
            raise ConfigError(
                f"what {_name(fn)} returns on rank 0 must pickle, but is a {type(value).__name__}: {error}"
            ) from error
    except BaseException as error:
        # Notes are read in the order of their names: one that tells of another rank's failure comes after all others.
        note = Path(folder) / f"{int(isinstance(error, PeerError))}-{time.time_ns()}-{rank}"
        note.write_text(f"rank {rank} failed:\n\n{traceback.format_exc()}")
        raise


def _first_failure(folder: Path | None) -> str | None:
    """The traceback that was written first."""
    notes = sorted(folder.iterdir()) if folder is not None and folder.exists() else []
    return notes[0].read_text() if notes else None


def _describe(error: Any) -> str:
    rank, failure = error.get_first_failure()
    why = failure.message or "see its output above"
    return f"the process of rank {rank} ended with exit code {failure.exitcode} ({why})"


@contextmanager
def _children_environment() -> Iterator[None]:
    """One OpenMP thread per process unless the user chose a number, as torchrun does it; afterwards all is as before.

    torch 2.13 leaves TORCHELASTIC_SIGNALS_TO_HANDLE in this process's environment.
    """
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


def _check_reachable(values: tuple[Any, ...]) -> None:
    """Everything must pickle, functions by their module and name."""
    for value in values:
        name = getattr(value, "__qualname__", "") if callable(value) else ""
        if "<lambda>" in name or "<locals>" in name:
            raise ConfigError(
                f"launch({_name(value)}): another process can't import a lambda or a function inside a function; "
                "define it at the "
                "top level of a module, or start the script with torchrun."
            )
        if (
            name
            and getattr(value, "__module__", None) == "__main__"
            and not hasattr(sys.modules["__main__"], "__file__")
        ):
            raise ConfigError(
                f"launch({_name(value)}): another process can't import a function of an interactive session; put it "
                "into a "
                "file, or use strategy='ddp_fork'."
            )
        if isinstance(value, (tuple, dict)) and value:
            _check_reachable(tuple(value.values()) if isinstance(value, dict) else value)
            continue
        try:
            pickle.dumps(value)
        except Exception as error:
            raise ConfigError(
                f"launch got {_name(value)}, which can't be sent to another process ({error}); create it inside the "
                "function."
            ) from error


def _check_fork() -> None:
    if not hasattr(os, "fork"):
        raise ConfigError("start_method='fork' does not exist on this system; use strategy='ddp_spawn', or torchrun.")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise ConfigError(
            "CUDA is in use in this process already, so that it can't fork; restart the session and create nothing "
            "on a GPU "
            "before lite.launch, or start a script with torchrun."
        )


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
