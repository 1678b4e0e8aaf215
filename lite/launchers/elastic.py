"""Starts the processes of one machine through torch's elastic_launch, the machinery behind torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from lite.errors import ConfigError, LaunchError, choose
from lite.launchers.base import Launcher
from lite.launchers.notes import VARIABLE, first_failure, leave_note

T = TypeVar("T")

START_METHODS = ("spawn", "fork", "forkserver")
_HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


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
        """Run `fn(*args, **kwargs)` in every process and return rank 0's value; sys.exit(0) in it returns None.

        Raises:
            ConfigError: The function or an argument can't reach another process.
            LaunchError: A process failed; the message holds the traceback of the one that failed first.
            SystemExit: This process was told to end, by SIGTERM say; the others have been ended.
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
            LaunchError: A process failed; the message holds the traceback of the one that failed first, if it had
                come as far as to make a Lite.
        """
        command = _rerun_command()
        sys.stdout.flush()
        with tempfile.TemporaryDirectory(prefix="lite-launch-") as folder:
            self._run(sys.executable, ("-u", *command), Path(folder), {VARIABLE: f"{os.getpid()}:{folder}"})
        raise SystemExit(0)

    def _run(
        self,
        entry: Callable[..., Any] | str,
        args: tuple[Any, ...],
        folder: Path,
        variables: dict[str, str] | None = None,
    ) -> dict[int, Any]:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
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
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "torchelastic")),
        )
        if hasattr(config, "signals_to_handle"):  # not in older torch
            config.signals_to_handle = ",".join(number.name for number in _handled())
        received: int | None = None
        try:
            with _children_environment(variables or {}), _signal_handlers():
                return dict(elastic_launch(config, entry)(*args))
        except ChildFailedError as error:
            raise LaunchError(first_failure(folder, error)) from None
        except SignalException as error:
            received = int(error.sigval)
        return _end_by(received)

    def _check_main(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise ConfigError(
                "lite.launch was reached while a started process imports the main script; put the call under "
                "`if __name__ == '__main__':`, or start the script with torchrun."
            )


def _rerun_command() -> list[str]:
    """What python's command line was for this script, found again from any working directory."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if file is None:
        raise ConfigError(
            "launch() has no script to run again in an interactive session; pass a function: lite.launch(fn)."
        )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does it
    if spec is not None and spec.name != "__main__":
        return [*flags, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    # `python folder/` and `python archive.zip` run the __main__ that lies in them.
    script = os.path.abspath(file if spec is None else os.path.dirname(file))
    if not os.path.exists(script):
        raise ConfigError(
            f"launch() can't find the script {file!r} to run it again; start it from a file, by a path that stays "
            "valid (without os.chdir before launch), or pass a function: lite.launch(fn)."
        )
    return [*flags, script, *sys.argv[1:]]


def _work(folder: str, start_method: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    """What each process does; a traceback is left where the parent finds it."""
    if start_method == "fork":
        torch.set_num_threads(1)
    rank = os.environ["RANK"]
    try:
        try:
            value = fn(*args, **kwargs)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            value = None
        try:
            return pickle.dumps(value if rank == "0" else None)
        except Exception as error:
            raise ConfigError(
                f"what the launched function returns on rank 0 must pickle, but is a {type(value).__name__}: {error}"
            ) from error
    except BaseException as error:
        leave_note(Path(folder), rank, error, f"rank {rank} failed:\n\n{traceback.format_exc()}")
        raise


def _end_by(number: int) -> NoReturn:
    """Do what the signal does to this process without a launch in it: Ctrl-C interrupts, SIGTERM exits with 143."""
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)
    raise SystemExit(128 + number)


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """Give this process its signal handlers back afterwards; torch 2.13 leaves its own, which raise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _handled() -> list[signal.Signals]:
    """What is handed on to the processes, which end; a SIGUSR1 that this process has a use for is not."""
    numbers = [getattr(signal, name) for name in _HANDLED if hasattr(signal, name)]
    return [number for number in numbers if number.name != "SIGUSR1" or signal.getsignal(number) == signal.SIG_DFL]


@contextmanager
def _children_environment(variables: dict[str, str]) -> Iterator[None]:
    """These, and one OpenMP thread per process unless the user chose a number, as torchrun does it; afterwards all is
    as before.

    torch 2.13 leaves TORCHELASTIC_SIGNALS_TO_HANDLE in this process's environment.
    """
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def _check_reachable(values: tuple[Any, ...]) -> None:
    """Everything must pickle, functions by their module and name."""
    for value in values:
        name = getattr(value, "__qualname__", "") if callable(value) else ""
        if "<lambda>" in name or "<locals>" in name:
            raise ConfigError(
                f"launch({_name(value)}): another process can't import a lambda or a function inside a function; "
                "define it at the top level of a module, or start the script with torchrun."
            )
        if (
            name
            and getattr(value, "__module__", None) == "__main__"
            and not hasattr(sys.modules["__main__"], "__file__")
        ):
            raise ConfigError(
                f"launch({_name(value)}): another process can't import a function of an interactive session; put it "
                "into a file, or use strategy='ddp_fork'."
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
            "on a GPU before lite.launch, or start a script with torchrun."
        )


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)
