"""Fixtures that all tests share: the real data, one Ray, and a clean environment."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayjobs.cluster import patience
from tests.marker_models import marker_adapters, merged_model, tiny_model
from tests.oss_server import KEY, OssServer, Store

__all__ = ["marker_adapters", "merged_model", "tiny_model"]

os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    DS_ACCELERATOR="cpu",
    MPLBACKEND="agg",
)
os.environ.pop("RAY_ADDRESS", None)

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that lie beside the project; tests that need them are skipped where they are not there."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray of two CPUs for the whole test run, in a folder of its own."""
    import ray

    folder = tempfile.mkdtemp(prefix="danlu-t-")
    with patience():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=300 << 20,
            log_to_driver=False,
            _temp_dir=folder,
        )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["s3", "oss"])
def bucket(request: pytest.FixtureRequest) -> str:
    """The URL of an empty bucket; this process and its children find the server through their environment."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


@pytest.fixture
def oss_bucket(store: Store) -> str:
    """The URL of an empty bucket at a stand-in for OSS."""
    return "oss://danlu"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """What a stand-in for OSS holds, with the bucket `danlu`; this process and its children find it."""
    from pipelines.artifacts.oss import OssFileSystem

    with OssServer() as server:
        monkeypatch.setenv("OSS_ENDPOINT", server.endpoint)
        monkeypatch.setenv("OSS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", "secret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        server.store.buckets["danlu"] = {}
        OssFileSystem.clear_instance_cache()  # which remembers the server before
        yield server.store


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket at a server that speaks S3's protocol."""
    import fsspec
    from moto.server import ThreadedMotoServer

    from pipelines.artifacts.workspace import Workspace

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**credentials, "AWS_ENDPOINT_URL": f"http://{address}:{port}"}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # which remembers the server before
    url = f"s3://danlu-{uuid.uuid4().hex[:12]}"  # what is stored outlives a server, and its port comes again
    Workspace(url).fs.mkdir(url)
    yield url
    server.stop()
