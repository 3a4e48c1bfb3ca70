import fsspec
import pytest

from tests.support.servers import DATA


@pytest.fixture(scope="module")
def proxy(s3):
    """A proxy, that fails when told to, in front of a real S3 server with ``bucket/0.tar``."""
    fsspec.filesystem("s3").pipe("bucket/0.tar", DATA)
    return s3


@pytest.fixture
def storage(proxy, short_pauses):
    proxy.reset()
    yield proxy
    proxy.reset()
