"""Finds the worker that died first, and kills the others."""

import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from clipfilter_wds.workers.crashes import CrashTracker, WorkerDiedError

#: Seconds that workers have to end by themselves, and as many again after SIGTERM.
GRACE_SECONDS = 0.5


class DeathWatch:
    """Finds the worker that died first, and kills the others.

    A worker that is killed while it sends may leave half a message in the pipe that all workers share. The reader waits
    for the other half until no process is left that could write it.
    """

    def __init__(self, workers: Sequence[BaseProcess], tracker: CrashTracker) -> None:
        self._workers, self._tracker = workers, tracker
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._death: WorkerDiedError | None = None
        self._thread = threading.Thread(target=self._run, name="clipfilter-watch", daemon=True)

    def start(self) -> None:
        """Watch, in a thread that ends with the workers."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the workers have ended."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():  # which may collect garbage
            self._thread.join(GRACE_SECONDS)

    def _run(self) -> None:
        sentinels = {worker.sentinel for worker in self._workers}
        while sentinels and self.find() is None:
            sentinels -= set(wait(sentinels))
            if self._stopped.wait(GRACE_SECONDS):  # time to take what has been sent
                return
        if self.find() is not None:
            for worker in self._workers:
                worker.kill()

    def find(self) -> WorkerDiedError | None:
        """The death of a worker; None where all are alive or have ended because they were done."""
        with self._lock:  # several threads ask, and the system tells of a child's end only once
            if self._death is None:
                self._death = next((death for death in map(self._death_of, range(len(self._workers))) if death), None)
            return self._death

    def _death_of(self, worker: int) -> WorkerDiedError | None:
        sample, process = self._tracker.last_seen(worker), self._workers[worker]
        at_sample = sample is not None and sample.index is not None
        if process.is_alive() or (process.exitcode == 0 and not at_sample):
            return None
        return WorkerDiedError(sample, process.exitcode)
