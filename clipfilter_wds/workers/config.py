"""Checks the options that all use of worker processes has in common. Imports nothing."""

#: Seconds that a sample may take to decode.
DEFAULT_WORKER_TIMEOUT = 120.0


def check_worker_timeout(seconds: float) -> None:
    """Refuse what is no time.

    Raises:
        ValueError: When it is negative or not finite.
    """
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"worker_timeout is {seconds:g}; it is a number of seconds, or 0 for no limit")
