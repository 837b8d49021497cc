"""Ranks: one process on its own, or one of several that harness/machines.py or torchrun started; and how they end.

Ranks that train together end together. What ends the first of them is written into the store where they met, so that
one rank says it and the others end quietly. A rank that falls silent (stopped, its machine or network gone) is missed
by the rank before it; a store that falls silent, by all.
"""

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from harness.device import choose_device
from harness.errors import UserError

LOST = os.EX_TEMPFAIL  # 75: the exit status of a rank that lost another one; the same command may well succeed
CONTINUES = "the same command continues from the last checkpoint"
_LEFT = "left"
LAUNCHER = "OFFBYONE_LAUNCHER"  # the variable by which a launcher tells the rank that it starts its own process id
_ENDS_WITHIN = 3  # seconds: a rank, by itself, once another one has ended


@dataclass
class Ranks:
    """This process's place among those that train one model together. Rank 0 alone writes files and prints."""

    device: torch.device
    rank: int = 0
    size: int = 1
    watch: "Watch | None" = None
    background: threading.Thread | None = None  # which writes a checkpoint

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers, so that all take the same branch."""
        if self.size > 1:
            dist.all_reduce(tensor := torch.tensor(number), dist.ReduceOp.MAX)
            number = int(tensor)
        return number

    def share(self, value):
        """Rank 0's value of a plain Python object, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value) -> list:
        """Every rank's value of a plain Python object, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Around what may save in the background: a save that has begun is finished, also where an error ends this."""
        try:
            yield
        finally:
            if self.background:
                self.background.join()

    def leave(self) -> None:
        """The end of a rank's work, when that of all has come: launchers kill what lives on after one has ended."""
        if self.size > 1:
            self.max(0)
            dist.destroy_process_group()
        if self.watch:
            self.watch.leave()


def is_one_of_several() -> bool:
    """Whether this process was started as a rank among others, as its environment says."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def join_ranks(device_name: str) -> Ranks:
    """This process alone on its device or, under torchrun, its rank on a device of its own."""
    _end_with_launcher()
    if not is_one_of_several():
        return Ranks(choose_device(device_name))
    numbers = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    wrong = [name for name in numbers if not os.environ.get(name, "").isdecimal()]
    if wrong := wrong + [name for name in ("MASTER_ADDR",) if not os.environ.get(name)]:
        said = f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several ranks"
        raise UserError(
            f"{said}, but not so {', '.join(wrong)}: unset it, or start ranks by ./run_training.sh or torchrun"
        )
    limit = os.environ.get("RANK_TIMEOUT") or "30"
    if not limit.isdecimal() or not 1 <= int(limit) <= 86_400:
        raise UserError(f"RANK_TIMEOUT: {limit!r} is not a whole number of seconds from 1 to 86400")
    device = choose_device(device_name)
    if device.type == "cuda":
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    watch = Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(limit))
    # Gradients travel by NCCL; flags and sums of plain numbers stay on the CPU, so that they never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"timeout": timedelta(minutes=30)}
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # torchrun's store has the former ranks' addresses
        options |= {"store": meeting_store(), "rank": watch.rank, "world_size": watch.size}
        options["store"].set_timeout(options["timeout"])
    dist.init_process_group(backend, **options)
    return Ranks(device, dist.get_rank(), dist.get_world_size(), watch)


def end_process(main: Callable[[], int]) -> NoReturn:
    """End this process with the status of `main()`. One of several ranks leaves out the interpreter's own end, in which
    a thread of PyTorch's may abort it and so change the status."""
    try:
        status = main()
    except SystemExit as request:
        status = request.code if isinstance(request.code, int) else 1
    if is_one_of_several():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _end_with_launcher() -> None:
    """From here on, to lose the launcher that started this process is a request to stop: who lived on would keep the
    run's folder. Not where a shell did, which may go, as under nohup."""
    if LAUNCHER not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.pop(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Around the work of a rank. Of an error that several ranks meet, or that ends the others, the first one is raised,
    and the other ranks end quietly with its status; so they do where a signal has ended one at once. Of a rank that was
    lost, each machine says one line, and the status is LOST."""
    try:
        yield
    except BaseException as error:
        status = _status(error)
        can_meet = os.environ.keys() >= {"RANK", "MASTER_ADDR"} and os.environ.get("MASTER_PORT", "").isdecimal()
        if not is_one_of_several() or not can_meet or not status:
            raise
        lost = isinstance(error, Exception) and not isinstance(error, UserError) and _lost_connection(error)
        ending = Ending(LOST if lost else status, lost or str(error), os.environ["RANK"])
        first = ending
        with contextlib.suppress(dist.DistError):  # the store may be what was lost
            patience = _ENDS_WITHIN if lost else 0  # the cause of a loss may come after it
            first = with_timeout(lambda: ending.announced(meeting_store(), patience))
        if lost or (first != ending and first.status != LOST):
            sys.exit(first.say())
        raise


def _status(error: BaseException) -> int:
    """The exit status of a process that this ends; 0 after `--help`."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case UserError() | OSError():
            return 2
    return 1


def _lost_connection(error: BaseException | None) -> str:
    """What PyTorch says of a connection to another rank that broke; empty where the error is another one."""
    while error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            what = re.sub(r"^\[\S*gloo/\S*\] |\. .*", "", " ".join(str(error).split()))  # without file and advice
            return f"the connection to another rank broke ({what})"
        error = error.__cause__ or error.__context__
    return ""


def meeting_store() -> dist.Store:
    """A connection to the store where the ranks meet, of one's own: calls on a shared one wait for each other."""
    store = connected(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # torchrun keeps one store for all of its attempts
    return dist.PrefixStore(f"attempt{attempt}", store) if attempt else store


def connected(address: str, port: int) -> dist.TCPStore:
    """A connection to the store at this address; DistNetworkError where nothing answers within some seconds."""
    try:
        socket.create_connection((address, port), timeout=5).close()  # PyTorch's own attempts print pages when in vain
    except OSError as error:
        raise dist.DistNetworkError(f"{address}:{port}: {error}") from error
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))


def with_timeout(call: Callable[[], Any], seconds: float = 5) -> Any:
    """What a call to the store returns. DistNetworkError after some seconds: where the other machine has gone without a
    word, such a call would never return, nor let a signal in."""
    future: Future = Future()

    def ask() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise dist.DistNetworkError(f"no answer within {seconds} s") from None


@dataclass
class Ending:
    """Why a run ends: the status of its ranks, one line, and by whom it was found."""

    status: int
    reason: str
    by: str

    KEY = "ending"

    def announced(self, store: dist.Store, patience: float = 0) -> "Ending":
        """The run's first ending, which is this one if there is none after `patience` seconds."""
        deadline = time.monotonic() + patience
        while not store.check([self.KEY]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Ending.read(store.compare_set(self.KEY, "", f"{self.status}\0{self.by}\0{self.reason}"))

    @staticmethod
    def read(value: bytes) -> "Ending":
        status, by, reason = value.decode().split("\0")
        return Ending(int(status), reason, by)

    def say(self, store: dist.Store | None = None, machine: int | None = None) -> int:
        """Print a loss, once a machine; other endings are said by who met them. Returns the status."""
        if self.status == LOST:
            machine = int(os.environ.get("GROUP_RANK", 0)) if machine is None else machine
            try:
                first = with_timeout(lambda: (store or meeting_store()).add(f"said/{machine}", 1)) == 1
            except dist.DistError:
                first = os.environ.get("LOCAL_RANK", "0") == "0"
            if first:
                print(f"error: {self.reason}: {CONTINUES}", file=sys.stderr, flush=True)
        return self.status


class Watch:
    """Two threads that end this process, whatever its main thread waits for, when the run has ended elsewhere or the
    store, or the next rank, has been silent for `limit` seconds."""

    def __init__(self, rank: int, size: int, limit: float):
        self.rank, self.size, self._next, self._limit = rank, size, (rank + 1) % size, limit
        self._interval = min(1.0, limit / 10)  # silence is counted in these, so that a pause of this process is none
        self._rounds, self._leaving = 0, threading.Event()
        self._talker = threading.Thread(target=self._talk, daemon=True)  # it may wait for a dead store for ever
        self._talker.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def leave(self) -> None:
        self._leaving.set()
        self._talker.join(_ENDS_WITHIN)

    def _talk(self) -> None:
        store: dist.Store | None = None
        heard, silence = "", 0
        own, other = f"alive/{self.rank}", f"alive/{self._next}"
        while not self._leaving.is_set():
            try:
                if store is None:
                    store = meeting_store()
                    if self._rounds and not store.check([own]):
                        raise dist.DistNetworkError("the store that answers is a later attempt's")
                store.set(own, f"{self._rounds + 1} on {socket.gethostname()}")
                if store.check([Ending.KEY]) and (ending := Ending.read(store.get(Ending.KEY))).by != str(self.rank):
                    self._leaving.wait(_ENDS_WITHIN)  # the main thread ends too, unless it waits for an ended rank
                    os._exit(ending.say())
                word = store.get(other).decode() if store.check([other]) else ""
                silence = silence + 1 if word == heard and word not in ("", _LEFT) else 0
                heard = word
                if silence * self._interval >= self._limit:
                    where = word.partition(" ")[2]
                    reason = f"rank {self._next} {where} has not been heard of for {self._limit:g} s"
                    os._exit(Ending(LOST, reason, str(self.rank)).announced(store).say())
                self._rounds += 1
            except (dist.DistError, RuntimeError):  # a round that _guard misses: the next one connects anew
                store = None
            self._leaving.wait(self._interval)
        if store:
            with contextlib.suppress(dist.DistError, RuntimeError):
                store.set(own, _LEFT)

    def _guard(self) -> None:
        rounds, silence = -1, 0
        while not self._leaving.wait(self._interval):
            silence = silence + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if silence * self._interval >= self._limit:
                where = f"{os.environ['MASTER_ADDR']}, where the ranks meet,"
                os._exit(Ending(LOST, f"{where} has not answered for {self._limit:g} s", str(self.rank)).say())
