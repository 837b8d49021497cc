"""This machine's ranks, started, ended together and, where asked, started again, and the machines that train with it.

This is torchrun's part, and ranks started by torchrun train as well. Here a user's mistake is one line and is not tried
again, a rank that was lost is one line, a request to stop has the time that saving takes, and a machine that comes back
is taken in again, the one where the ranks meet included: every attempt meets in a store of its own.
"""

import contextlib
import fcntl
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from harness.distributed import CONTINUES, LAUNCHER, LOST, Ending, connected, with_timeout
from harness.errors import UserError
from harness.signals import heeded

_KILLED_AFTER = 5  # seconds that the others have to end by themselves once one rank, or one machine, has ended
_ANSWERED_WITHIN = 15  # seconds, by a store at which this machine waits
_SAID_AFTER = 10  # seconds of waiting for another machine
_PATIENCE = 30 * 60  # seconds to wait for it, as PyTorch waits for another rank
_TICK = 0.1  # seconds between two looks
_SIOCGIFADDR = 0x8915  # Linux: an interface's address


@dataclass(frozen=True)
class Machines:
    """Those that train together, as many ranks on each, and which one this is. All meet at the first's `address`."""

    size: int = 1
    rank: int = 0
    address: str = "localhost"
    port: int = 0  # one that is free
    ranks: int = 1
    restarts: int = 0


def machines_of(environment: Mapping[str, str], gpus: int, batch_size: int) -> Machines:
    """What NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE and MAX_RESTARTS say, or in a step that `srun`
    started SLURM's own variables; UserError for a mistake in them. `--max-restarts` is the command line's and comes
    before MAX_RESTARTS. A machine has a rank a GPU by default, or as many as can share a batch of `batch_size`
    sequences."""

    def number(default: int | None, least: int, most: int, *names: str) -> int:
        name = next((n for n in names if environment.get(n)), None)
        if name is None and default is None:
            raise UserError(f"{names[0]} is not set: with several machines it counts them, from 0 on")
        value = environment[name] if name else str(default)
        if not value.isascii() or not value.isdigit() or not least <= int(value) <= most:
            raise UserError(f"{name}: {value!r} is not a whole number from {least} to {most}")
        return int(value)

    size = number(1, 1, 100_000, "NNODES", "SLURM_STEP_NUM_NODES")
    restarts = number(0, 0, 1_000_000, "--max-restarts", "MAX_RESTARTS")
    number(30, 1, 86_400, "RANK_TIMEOUT")  # read by each rank
    usable = max((n for n in range(1, gpus + 1) if batch_size % (n * size) == 0), default=max(gpus, 1))
    ranks = number(usable, 1, gpus or 10_000, "NPROC_PER_NODE")
    if usable < gpus and not environment.get("NPROC_PER_NODE"):
        print(f"using {usable} of {gpus} GPUs: they have to divide training.batch_size, {batch_size}")
    if size == 1 and not environment.get("NNODES") and environment.get("NODE_RANK"):
        raise UserError(
            "NODE_RANK is set and NNODES, how many machines train together, is not: set it, or unset NODE_RANK"
        )
    if size == 1:
        return Machines(ranks=ranks, restarts=restarts)
    rank = number(None, 0, size - 1, "NODE_RANK", "SLURM_NODEID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    if not environment.get("NNODES") and tasks != str(size):
        raise UserError(f"srun started {tasks} tasks on {size} nodes: start one a node, by srun --ntasks-per-node=1")
    if not (address := environment.get("MASTER_ADDR") or _first_slurm_host(environment)):
        raise UserError("MASTER_ADDR is not set: with several machines it is the address of the one with NODE_RANK 0")
    port = 29500 + int(environment.get("SLURM_JOB_ID", 0)) % 1000  # two jobs may share a node
    return Machines(size, rank, address, number(port, 1, 65535, "MASTER_PORT"), ranks, restarts)


def _first_slurm_host(environment: Mapping[str, str]) -> str:
    """The first of the names that stand for `node[01-04,7]`."""
    if not (nodes := environment.get("SLURM_STEP_NODELIST")):
        return ""
    try:
        named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return named.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(f"scontrol show hostnames {nodes} names none: set MASTER_ADDR to the first of them") from None


class Launcher:
    """Starts this machine's ranks, and ends when they have ended. Signals are this process's from here on: what is
    heeded reaches every rank, which has all the time that saving takes. A second Ctrl-C kills. Ctrl-Z and `fg` pause
    and continue the ranks too."""

    def __init__(self, machines: Machines):
        self.machines = machines
        self._asked: list[int] = []  # the numbers of the signals that have come
        self._killed = False
        self._processes: list[subprocess.Popen] = []
        for number in heeded():
            signal.signal(number, self._ask)
        signal.signal(signal.SIGTSTP, self._pause)

    def run(self, command: Callable[[], list[str]], prepare: Callable[[], None]) -> int:
        """The exit status: 0 where that of every rank is, else that of the first rank that failed, else 128 + the
        number of the signal after which they have saved. `command` says what the ranks of an attempt are to run.
        `prepare` is called on the first machine before any rank starts, and the others wait for it."""
        for restarts in range(self.machines.restarts, -1, -1):
            code = self._attempt(command(), prepare, again=restarts < self.machines.restarts)
            if self._killed:
                return 128 + signal.SIGINT
            if self._asked or not restarts or code in (0, 2) or code > 128:  # done, a user's mistake, or stopped
                break
            print(f"starting the ranks again, from the last checkpoint (restarts left: {restarts - 1})", flush=True)
        return code if code >= 0 else 128 - code

    def _attempt(self, command: list[str], prepare: Callable[[], None], again: bool) -> int:
        """0, or the first failure's return code, which is negative after a signal."""
        m = self.machines
        try:
            store = self._open_store(again)
            if m.rank == 0:
                self._make_ready(store, prepare)
            else:
                self._wait_until(lambda: store.check(["ready"]), f"{m.address} to prepare the corpus")
                if code := int(with_timeout(lambda: store.get("ready"))):
                    self._leave_store(store)
                    return code
        except _WaitedInVain as error:
            return error.status
        except dist.DistError:
            print(f"error: {m.address} was lost while this machine waited for it: {CONTINUES}", file=sys.stderr)
            return LOST
        self._start(command, store)
        code = self._wait(store)
        self._leave_store(store)
        return code

    def _open_store(self, again: bool) -> dist.TCPStore:
        """The store of an attempt: a new one on the first machine, which keeps it, and a connection to it on others."""
        m = self.machines
        stores: list[dist.TCPStore] = []

        def come() -> bool:
            try:
                if m.rank == 0:
                    patience = timedelta(seconds=5)
                    store = dist.TCPStore(m.address, m.port, None, True, patience, wait_for_workers=False)
                else:
                    store = connected(m.address, m.port)
                store.set(f"shape/{m.rank}", f"{m.size} × {m.ranks}")
                # Every attempt has a store of its own, which counts each machine once. Where this one has been counted
                # before, that is the store of the former attempt, not ended yet: the first machine will close it,
                # and open the next one.
                if store.add(f"come/{m.rank}", 1) == 1:
                    stores.append(store)
            except dist.DistError as error:
                if isinstance(error.__cause__, socket.gaierror):
                    raise UserError(f"MASTER_ADDR: {m.address} is not the name of a machine known here") from None
                if m.rank == 0 and not again:  # where the port is perhaps not free again yet
                    raise UserError(
                        f"MASTER_ADDR, MASTER_PORT: {m.address}:{m.port} cannot be opened on this machine, which has "
                        f"NODE_RANK 0 ({str(error).partition('. ')[0]})"
                    ) from None
            return bool(stores)

        self._wait_until(come, f"{m.address}, port {m.port}")
        return stores[0]

    def _make_ready(self, store: dist.TCPStore, prepare: Callable[[], None]) -> None:
        """On the first machine: when all is prepared and everyone has come, the word to start; else that to end."""
        m, code = self.machines, 2
        try:
            prepare()
            for other in range(1, m.size):
                self._wait_until(partial(store.check, [f"come/{other}"]), f"the machine with NODE_RANK {other}")
                if (shape := store.get(f"shape/{other}").decode()) != f"{m.size} × {m.ranks}":
                    here = f"NNODES × NPROC_PER_NODE is {m.size} × {m.ranks}"
                    raise UserError(f"{here} here and {shape} on the machine with NODE_RANK {other}: make them equal")
            code = 0
        except _WaitedInVain as error:
            code = error.status
            raise
        except SystemExit as error:  # prepare was stopped by a signal
            code = int(error.code or 0)
            raise
        finally:
            store.set("ready", str(code))
            if code:
                self._leave_store(store)

    def _start(self, command: list[str], store: dist.TCPStore) -> None:
        m = self.machines
        shared = {
            "MASTER_ADDR": m.address,
            "MASTER_PORT": str(store.port),
            "WORLD_SIZE": str(m.size * m.ranks),
            "LOCAL_WORLD_SIZE": str(m.ranks),
            "GROUP_RANK": str(m.rank),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: no rank has to keep it
            "PYTHONUNBUFFERED": "1",
            LAUNCHER: str(os.getpid()),
        }
        usual = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # PyTorch warns of every connection that closes
        if m.ranks > 1:  # one alone has as many threads as without a launcher, and so the same losses
            usual["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // m.ranks))
        if m.size > 1 and (interface := _interface_towards(m.address)):
            usual["GLOO_SOCKET_IFNAME"] = interface  # gloo asks for the host's name, which is often 127.0.1.1
        for local in range(m.ranks):
            own = {"RANK": str(m.rank * m.ranks + local), "LOCAL_RANK": str(local)}
            # in a group of its own, which a terminal's Ctrl-C does not reach
            process = subprocess.Popen(command, env=usual | os.environ | shared | own, process_group=0)
            self._processes[local:] = [process]
        if self._asked:
            self._signal(signal.SIGKILL if self._killed else self._asked[0])

    def _wait(self, store: dist.TCPStore) -> int:
        """The first failure's return code, or else what the ranks say after a request to stop, or 0, when every rank
        has ended: after a failure within some seconds, after a request to stop whenever it has saved."""
        failure, deadline = 0, math.inf
        while True:
            codes = [process.poll() for process in self._processes]
            if (not failure or failure > 128) and (failed := [code for code in codes if code]):
                # the cause first; a failure while others have stopped as asked is one too
                failure = min(failed, key=lambda code: (code == LOST, code > 128, code > 0, code != 2))
                if failure < 0:
                    self._announce(codes.index(failure), failure, store)
                if failure <= 128:
                    deadline = time.monotonic() + _KILLED_AFTER
            if None not in codes:
                return failure
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(_TICK)

    def _announce(self, local: int, code: int, store: dist.TCPStore) -> None:
        """To all ranks, and here in a line: one was killed, and cannot say it itself. Where that was asked for, it had
        only begun, and nothing is lost."""
        number = signal.SIGINT if self._killed else -code
        name = signal.Signals(number).name + (" (out of memory?)" if number == signal.SIGKILL else "")
        rank = self.machines.rank * self.machines.ranks + local
        status = 128 + number if number in self._asked else LOST
        killed = Ending(status, f"rank {rank} on {socket.gethostname()} was killed by {name}", f"launcher of {rank}")
        with contextlib.suppress(dist.DistError):
            killed = with_timeout(lambda: killed.announced(store))
        killed.say(store, self.machines.rank)

    def _leave_store(self, store: dist.TCPStore) -> None:
        """The first machine, which keeps the store, ends once no other needs it, or they were silent for a while."""
        if self.machines.rank:
            with contextlib.suppress(dist.DistError):
                with_timeout(lambda: store.add("left", 1))
            return
        deadline = time.monotonic() + _KILLED_AFTER
        while store.add("left", 0) < self.machines.size - 1 and time.monotonic() < deadline and not self._killed:
            time.sleep(_TICK)

    def _wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for the condition; after some seconds, say once for what. _WaitedInVain if a signal asks for an end, or
        after half an hour, which is said."""
        start, said = time.monotonic(), False
        while not with_timeout(condition, _ANSWERED_WITHIN):
            if self._asked:
                raise _WaitedInVain(128 + self._asked[0])
            waited = time.monotonic() - start
            if waited > _PATIENCE:
                print(f"error: waited {_PATIENCE // 60} minutes for {what}: {CONTINUES}", file=sys.stderr)
                raise _WaitedInVain(LOST)
            if waited > _SAID_AFTER and not said:
                print(f"waiting for {what}", flush=True)
                said = True
            time.sleep(_TICK)

    def _ask(self, number: int, _frame) -> None:
        self._killed = self._killed or (number == signal.SIGINT and signal.SIGINT in self._asked)
        self._asked.append(number)
        self._signal(signal.SIGKILL if self._killed else number)

    def _pause(self, _number: int, _frame) -> None:
        self._signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until SIGCONT
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:  # what a rank has started is asked to end by the rank alone
                (os.kill if number in self._asked else os.killpg)(process.pid, number)


class _WaitedInVain(Exception):
    """The attempt cannot begin; `status` is the exit status."""

    def __init__(self, status: int):
        self.status = status


def _interface_towards(address: str) -> str | None:
    """The name of the network interface over which `address` is reached, or which has it; None where none is found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
        udp.connect((address, 9))  # nothing is sent
        own = socket.inet_aton(udp.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                if fcntl.ioctl(udp, _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None
