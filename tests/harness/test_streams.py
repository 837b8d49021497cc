"""Printing never ends a run, and where nobody reads what is printed the run is asked to save and end."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest
from tqdm import tqdm

from harness.errors import run_cli
from harness.streams import unfailing_output
from tests.processes import forked


@pytest.fixture
def outputs():
    """Descriptors by what is wrong with them."""
    reader, writer = os.pipe()
    os.close(reader)
    found = {"a full disk": os.open("/dev/full", os.O_WRONLY), "no reader": writer, "closed": None}
    yield found
    for descriptor in filter(None, found.values()):
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["a full disk", "no reader", "closed"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_no_output_raises_and_a_broken_pipe_asks_for_an_end(outputs, kind, stream):
    asked = []

    def prints():
        with unfailing_output():
            for _ in range(3):
                print("a line", file=getattr(sys, stream), flush=True)
                tqdm.write("a line", file=getattr(sys, stream))
                for _ in tqdm(range(2), file=getattr(sys, stream), mininterval=0):
                    pass
            if kind == "no reader":
                os.write({"stdout": 1, "stderr": 2}[stream], b"of a handler or a child: it goes to /dev/null\n")

    def main():
        signal.signal(signal.SIGHUP, lambda number, _frame: asked.append(number))
        return run_cli(prints) or 10 + len(asked)

    null = os.open(os.devnull, os.O_WRONLY)
    assert forked(main, **{"stdout": null, "stderr": null} | {stream: outputs[kind]}) == 10 + (kind == "no reader")
    os.close(null)


@pytest.mark.parametrize(
    ("handler", "status"),
    [(signal.SIG_DFL, 141), (signal.SIG_IGN, 7)],  # nothing to save yet; under nohup
)
def test_where_nothing_handles_a_hangup_it_ends_as_a_pipe_does_or_goes_on(outputs, handler, status):
    def prints():
        with unfailing_output():
            print("a line", flush=True)
        return 7

    def main():
        signal.signal(signal.SIGHUP, handler)
        return run_cli(prints)

    assert forked(main, outputs["no reader"], outputs["no reader"]) == status


def test_closed_streams_give_their_numbers_to_no_file(tmp_path):
    def main():
        print("a line")
        print("a line", file=sys.stderr)
        with open(tmp_path / "file", "w") as file:
            return file.fileno() < 3

    assert forked(lambda: run_cli(main)) == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_pipe_that_does_not_block_and_is_read_slowly_gets_everything():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = []

    def read():
        with contextlib.suppress(OSError):
            while data := os.read(reader, 10_000):
                received.append(data)
                time.sleep(0.001)

    def prints():
        with unfailing_output():
            for _ in range(20):
                print("x" * 9_999, flush=True)

    thread = threading.Thread(target=read)
    thread.start()
    assert forked(lambda: run_cli(prints), writer, writer) == 0
    os.close(writer)
    thread.join()
    os.close(reader)
    assert sum(map(len, received)) == 200_000
