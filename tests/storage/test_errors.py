import errno

import pytest

from clipfilter_wds.storage.errors import ChangedError, may_pass, reason, without_secrets


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host/0.tar",
        "https://secret@host/0.tar and https://host/1.tar",
        "404, message='Not Found', url='https://host/0.tar?X-Amz-Signature=secret&a=b'",
        "ftp://user:sec@secret@host/0.tar",
        "az://box/0.tar?sv=1&sig=secret: no",
    ],
)
def test_no_secret_of_a_url_is_left_in_a_text(text):
    assert "secret" not in without_secrets(text)
    assert "0.tar" in without_secrets(text)
    assert "secret" not in reason(OSError(text), "")


def test_no_part_of_a_url_that_a_library_quotes_gives_a_secret_away():
    url = "s3://key:secret@bucket/0.tar?token=hidden"
    for text in ("no bucket key:secret@bucket", "no key 0.tar?token=hidden", "secret is no password"):
        said = reason(OSError(text), url)
        assert "secret" not in said
        assert "hidden" not in said


def test_a_glob_stays_readable():
    assert without_secrets("no shard matches 's3://bucket/0?.tar'") == "no shard matches 's3://bucket/0?.tar'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "input/output error"), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ChangedError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert may_pass(error) is expected
