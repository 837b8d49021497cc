"""A worker answers from a process of its own; what goes wrong there comes back, or is said."""

import os

import pytest

from harness.errors import UserError
from harness.workers import Worker, WorkerError


class Counter:
    def __init__(self, start: int):
        self.count = start

    def add(self, n: int) -> int:
        self.count += n
        return self.count

    def process(self) -> int:
        return os.getpid()

    def fail(self, kind: str) -> None:
        if kind == "user":
            raise UserError("no such config")
        if kind == "exit":
            os._exit(7)
        raise KeyError("missing")


@pytest.fixture
def worker():
    worker = Worker(Counter, 10)
    yield worker
    worker.stop()


@pytest.mark.slow
def test_it_keeps_its_state_in_its_own_process(worker):
    assert [worker.ask("add", 1), worker.ask("add", 5)] == [11, 16]
    assert worker.ask("process") != os.getpid()


@pytest.mark.slow
def test_what_goes_wrong_is_raised_here_and_it_goes_on(worker):
    with pytest.raises(UserError, match="no such config"):
        worker.ask("fail", "user")
    with pytest.raises(WorkerError, match="KeyError: 'missing'") as error:
        worker.ask("fail", "own")
    assert "in fail" in error.value.log
    assert worker.ask("add", 1) == 11
    with pytest.raises(WorkerError, match="its process ended with status 7"):
        worker.ask("fail", "exit")
