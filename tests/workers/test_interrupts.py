import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from clipfilter_wds.workers.interrupts import TerminatedError, interrupted_by
from tests.support.pace import FOREVER

#: Interrupted at a moment at which Python ignores what is raised.
SCRIPT = """
import os, signal, sys, time
from clipfilter_wds.workers.interrupts import interrupted_by

def stop():
    os.kill(os.getpid(), int(sys.argv[2]))

class Stopping:
    def __del__(self):
        stop()

def fork():
    os.register_at_fork(after_in_parent=stop)
    if not os.fork():
        os._exit(0)

def collect():
    Stopping()

try:
    with interrupted_by(signal.SIGTERM):
        {"fork": fork, "collect": collect}[sys.argv[1]]()
        time.sleep(1000)
except KeyboardInterrupt as error:
    sys.exit(type(error).__name__)
"""


def test_sigterm_ends_the_block_once_and_is_as_before_afterwards():
    def stop():
        with interrupted_by(signal.SIGTERM):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # does not cut short what the block has to end

    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(TerminatedError):
        stop()
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_of_two_signals_is_the_one_that_counts(first):
    ended = []

    def stop():
        with interrupted_by(signal.SIGINT, signal.SIGTERM):
            try:
                signal.raise_signal(first)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                ended.append(True)

    with pytest.raises(KeyboardInterrupt) as error:
        stop()
    assert error.type is (TerminatedError if first == signal.SIGTERM else KeyboardInterrupt)
    assert ended == [True]


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "TerminatedError")], ids=str
)
@pytest.mark.parametrize("moment", ["fork", "collect"])
def test_a_signal_whose_exception_python_ignores_ends_the_block_all_the_same(moment, number, error):
    command = [sys.executable, "-c", SCRIPT, moment, str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=FOREVER, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"{error}\n")


def test_other_errors_of_destructors_are_told_of_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Failing:
        def __del__(self):
            raise ValueError("as ever")

    with interrupted_by(signal.SIGTERM):
        Failing()
    assert [one.exc_type for one in told] == [ValueError]


def test_a_block_that_ends_in_time_is_not_interrupted_later():
    class Stopping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    with interrupted_by(signal.SIGTERM):
        Stopping()
    time.sleep(0.2)


def test_a_command_that_runs_in_another_thread_leaves_signals_alone():
    before, seen = (signal.getsignal(signal.SIGTERM), sys.unraisablehook), []

    def run():
        with interrupted_by(signal.SIGTERM):
            seen.append((signal.getsignal(signal.SIGTERM), sys.unraisablehook))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
