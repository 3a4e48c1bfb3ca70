"""Models that several tests share; they are made once."""

import signal
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, settings

from clipfilter_wds.cli import main
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.storage import errors as remote
from tests.support.servers import FailingProxy, s3_server
from tests.support.toys import make_clip

# The models here are tiny: a second thread costs more than it brings, above all beside DataLoader workers.
torch.set_num_threads(1)

# How long an example takes depends on who else works.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, import only what such tests take: a machine with a GPU may lack what others need."""
    if config.option.markexpr != "gpu" or collection_path.name == "conftest.py":
        return None
    files = collection_path.rglob("*.py") if collection_path.is_dir() else [collection_path]
    return None if any(_has_gpu_tests(file) for file in files) else True


def _has_gpu_tests(file: Path) -> bool:
    text = "" if file.name == "conftest.py" else file.read_text()
    return "mark.gpu" in text or "support.gpu" in text


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("models") / "clip-32")


@pytest.fixture(scope="session")
def scorer(clip_folder) -> ClipScorer:
    return ClipScorer(clip_folder, device="cpu")


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    """Storage that fails is tried again as often as ever, but soon."""
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.02,) * len(remote.RETRY_SECONDS))


@pytest.fixture(scope="session")
def s3():
    """A real S3 server with an empty ``bucket``, behind a proxy that fails when told to; ``s3://`` URLs lead there."""
    with s3_server() as port, FailingProxy(port) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.address)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAKEYOFTESTS")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Both libraries below try again by themselves; once is enough to see what this package does.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        fsspec.filesystem("s3").mkdir("bucket", acl="public-read-write")
        yield proxy


@pytest.fixture
def command(capsys):
    """Run a command in this process: its exit code, and all that it showed."""

    def run(*arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    return run


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The folder, empty so far, where ``simplecache::`` URLs keep their shards."""
    monkeypatch.setitem(fsspec.config.conf, "simplecache", {"cache_storage": str(tmp_path / "cache")})
    return tmp_path / "cache"
