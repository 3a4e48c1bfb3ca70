"""Explains storage errors without giving secrets away, and retries requests that may succeed later."""

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: Pauses before the second, third, ... attempt; each varies by half, so that many readers don't come back at once.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "NotImplementedError"}
_TRANSIENT_STATUS = {408, 425, 429}


class ChangedError(Exception):
    """A file was replaced while it was being read."""


def reason(error: BaseException, url: str) -> str:
    """Why storage failed at a URL, without the URL's secrets."""
    if is_missing(error):
        return "there is no such file"
    error = _cause(error)
    text = without_secrets(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    for secret in _secrets_of(url):
        text = text.replace(secret, "***")
    return text


def is_missing(error: BaseException) -> bool:
    """Whether it says that there is no such file."""
    error = _cause(error)
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404


def _secrets_of(url: str) -> list[str]:
    """A URL's user with password, its password, and its query, where it has them: libraries quote parts of URLs."""
    user = re.search(r"://([^\s/?]*)@", url)
    secrets = [user[1], user[1].partition(":")[2]] if user else []
    return [secret for secret in (*secrets, url.partition("?")[2]) if "=" in secret or len(secret) > 2]


def without_secrets(text: str) -> str:
    """The text with user, password and query removed from every URL in it."""
    text = re.sub(r"(\w+://)[^\s/?'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)  # without "=", it is a glob's ?


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later. Where a file is missing or a password refused, it won't."""
    error = _cause(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _TRANSIENT_STATUS
    return not isinstance(error, (*_PERMANENT, ChangedError)) and type(error).__name__ not in _PERMANENT_NAMES


def _cause(error: BaseException) -> BaseException:
    """The error itself; but what went wrong on the web where fsspec made a ``FileNotFoundError`` of it."""
    cause = error.__cause__
    of_the_web = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if isinstance(error, FileNotFoundError) and cause is not None and of_the_web else error


def retrying(request: Callable[[], T]) -> T:
    """The result of a request, which is retried after growing pauses while its errors may pass.

    Raises:
        Exception: The last attempt's.
    """
    for pause in RETRY_SECONDS:
        try:
            return request()
        except Exception as error:  # each storage has errors of its own
            if not may_pass(error):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return request()
