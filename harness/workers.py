"""Objects that work in processes of their own, so that each has its memory to itself and none takes another down."""

import multiprocessing
import traceback

from harness.errors import UserError


class WorkerError(Exception):
    """What went wrong in a worker: its exception's name and message, or that its process ended."""

    log = ""
    """the traceback there"""


class Worker:
    """`make(*args)` in a new process, where `ask` calls its methods. What is sent either way is pickled.

    A UserError there is raised again here, any other exception as a WorkerError.
    """

    def __init__(self, make, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, args), daemon=True)
        self._process.start()
        there.close()

    def start(self, method: str, *args) -> None:
        """Have it begin, so that several can work at once; `result` waits for the end."""
        self._pipe.send((method, args))

    def result(self):
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise WorkerError(f"its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, method: str, *args):
        self.start(method, *args)
        return self.result()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe, make, args) -> None:
    worker = None
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the parent is done
            return
        try:
            worker = worker or make(*args)
            pipe.send(getattr(worker, method)(*arguments))
        except UserError as error:
            pipe.send(error)
        except Exception as error:
            failure = WorkerError(f"{type(error).__name__}: {error}")
            failure.log = traceback.format_exc()
            pipe.send(failure)
