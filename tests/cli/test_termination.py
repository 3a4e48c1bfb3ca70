import signal
import threading

import pytest

from clipfilter_wds.cli.termination import TerminatedError, ending_on_sigterm


def test_sigterm_ends_the_block_once_and_is_as_before_afterwards():
    def stop():
        with ending_on_sigterm():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # does not cut short what the block has to end

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError):
        stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_runs_in_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with ending_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
