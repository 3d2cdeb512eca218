"""OSS as fsspec asks for it, at a stand-in that speaks what Alibaba's client sends."""

import os
import threading
from pathlib import Path

import fsspec
import oss2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts import lease, oss
from pipelines.artifacts.oss import OssFileSystem
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, StageError
from pipelines.sources.files import list_files
from tests.oss_server import Store


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oss, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def fs(store: Store) -> OssFileSystem:
    return OssFileSystem(use_listings_cache=False)


def test_one_of_many_creates_an_object(store: Store, fs: OssFileSystem) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if Workspace("oss://danlu").write_if_absent("oss://danlu/commit", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.buckets["danlu"]["commit"] == b"%d" % won[0]
    with pytest.raises(FileExistsError, match="FileAlreadyExists"):
        fs.pipe_file("danlu/commit", b"late", mode="create")


def test_an_object_that_was_created_though_the_answer_was_lost_is_ours(store: Store, fs: OssFileSystem) -> None:
    answers = iter(["cut"])
    store.fail = lambda line: next(answers, None) if line.startswith("PUT") else None
    assert Workspace("oss://danlu").write_if_absent("oss://danlu/commit", b"mine")
    assert [line for line in store.requests if line.startswith("PUT")] == ["PUT /danlu/commit"] * 2


def test_a_server_that_fails_is_asked_again_and_then_named(store: Store, fs: OssFileSystem) -> None:
    fails = iter(["503 InternalError", "500 InternalError"])
    store.fail = lambda line: next(fails, None)
    fs.pipe_file("danlu/a", b"1")
    store.fail = lambda line: "503 ServiceUnavailable"
    with pytest.raises(StageError, match=r"oss://danlu/b: cannot be written \(ServiceUnavailable: .*what is finished"):
        Workspace("oss://danlu").write("oss://danlu/b", b"1")
    store.fail = lambda line: "403 AccessDenied"
    before = len(store.requests)
    with pytest.raises(StageError, match="AccessDenied"):
        Workspace("oss://danlu").exists("oss://danlu/a")
    assert len(store.requests) == before + 1
    store.fail = lambda line: None
    with pytest.raises(StageError, match=r"oss://nowhere/a: cannot be written \(NoSuchBucket"):
        Workspace("oss://nowhere").write("oss://nowhere/a", b"1")
    assert not Workspace("oss://nowhere").exists("oss://nowhere/a")


def test_a_bucket_that_replaces_though_told_not_to_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.1)
    store.versioned = True
    with pytest.raises(StageError, match="versioning"), Workspace("oss://danlu/run").held():
        pass
    assert not store.buckets["danlu"]
    store.versioned = False
    with Workspace("oss://danlu/run").held():
        assert list(store.buckets["danlu"]) == ["run/.running"]


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (5 << 20) + 1, 12 << 20])
def test_files_of_any_size_come_back(store: Store, fs: OssFileSystem, size: int) -> None:
    data = os.urandom(size)
    with fs.open("oss://danlu/data", "wb") as stream:
        for at in range(0, size, 1 << 20):
            stream.write(data[at : at + (1 << 20)])
            assert stream.tell() == min(size, at + (1 << 20))
        assert "data" not in store.buckets["danlu"]  # it appears whole
    assert store.buckets["danlu"]["data"] == data == fs.cat_file("oss://danlu/data")
    with fs.open("oss://danlu/data") as stream:
        assert stream.read() == data
        stream.seek(size // 2)
        assert stream.read(10) == data[size // 2 : size // 2 + 10]
    assert fs.cat_file("danlu/data", start=-3) == data[-3:] if size else True
    assert not store.uploads


def test_what_an_error_cut_short_does_not_appear(store: Store, fs: OssFileSystem) -> None:
    for size in (3, 11 << 20):
        stream = fs.open("danlu/export.jsonl", "wb", autocommit=False)
        stream.write(bytes(size))
        stream.flush()
        stream.discard()
    assert store.buckets["danlu"] == {} == store.uploads
    with pytest.raises(ValueError, match="rb or wb"):
        fs.open("danlu/a", "ab")


def test_parquet_of_many_row_groups_comes_back(store: Store) -> None:
    workspace = Workspace("oss://danlu/run")
    path = workspace.path("rows.parquet")
    tables = [pa.table({"text": [os.urandom(1000).hex() for _ in range(1500)]}) for _ in range(4)]
    with workspace.parquet_writer(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    assert workspace.parquet_file(path).read().equals(pa.concat_tables(tables))
    assert pq.ParquetFile(pa.BufferReader(store.buckets["danlu"]["run/rows.parquet"])).num_row_groups == 4


def test_listings_have_pages_folders_and_odd_names(
    store: Store, fs: OssFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.artifacts.oss.LISTED_AT_ONCE", 2)
    names = ["a.jsonl", "子/一 二+&%.jsonl", "b", "c/", "c/d", "z?x=1#y"]
    store.buckets["danlu"] = {f"rows/{name}": b"1" for name in names} | {"rows/": b"", "rowsx": b""}
    listed = fs.ls("oss://danlu/rows", detail=False)
    assert sorted(listed) == [f"danlu/rows/{name}" for name in ["a.jsonl", "b", "c", "z?x=1#y", "子"]]
    assert fs.ls("danlu/rows/c", detail=False) == ["danlu/rows/c/d"]
    assert fs.ls("danlu/rows/b", detail=False) == ["danlu/rows/b"]
    assert fs.info("danlu/rows/c")["type"] == "directory"
    assert fs.cat_file("danlu/rows/子/一 二+&%.jsonl") == b"1"
    for missing in ("danlu/row", "danlu/rows/x", "elsewhere/x"):
        with pytest.raises(FileNotFoundError):
            fs.ls(missing)
        assert not fs.exists(missing)
    assert Workspace("oss://danlu").list("oss://danlu/nothing") == []
    fs.rm("oss://danlu/rows", recursive=True)
    assert list(store.buckets["danlu"]) == ["rowsx"]


def test_a_source_and_a_folder_of_files_go_up_and_down(store: Store, fs: OssFileSystem, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    fs.put(str(tmp_path / "in"), "oss://danlu/up", recursive=True)
    fs.get("oss://danlu/up", str(tmp_path / "out"), recursive=True)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (tmp_path / "in" / "rows.jsonl").read_bytes()
    assert list_files("oss://danlu/up/*.jsonl") == ["oss://danlu/up/rows.jsonl"]
    assert fs.modified("danlu/up/rows.jsonl").year == 2026


def test_without_endpoint_or_keys_it_is_said_what_to_set(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSS_ACCESS_KEY_ID")
    OssFileSystem.clear_instance_cache()
    with pytest.raises(StageError, match="AccessDenied"):
        Workspace("oss://danlu").write("oss://danlu/a", b"")
    monkeypatch.delenv("OSS_ENDPOINT")
    OssFileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="oss://danlu/run: set OSS_ENDPOINT"):
        Workspace("oss://danlu/run").exists("oss://danlu/run/a")


@pytest.mark.parametrize("endpoint", ["https://oss-cn-hangzhou.aliyuncs.com", "oss-cn-hangzhou-internal.aliyuncs.com"])
def test_where_the_endpoint_tells_the_region_it_is_signed_for(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[oss2.http.Request] = []

    def refuse(self: oss2.Session, request: oss2.http.Request, timeout: float) -> None:
        asked.append(request)
        raise oss2.exceptions.RequestError(OSError("no network"))

    monkeypatch.setattr(oss2.Session, "do_request", refuse)
    fs = fsspec.filesystem("oss", endpoint=endpoint, key="id", secret="s", token="temporary")
    with pytest.raises(OSError, match="no network"):
        fs.pipe_file("danlu/a", b"")
    assert len(asked) == 3
    assert asked[0].headers["authorization"].startswith("OSS4-HMAC-SHA256 Credential=id/")
    assert "/cn-hangzhou/oss/aliyun_v4_request" in asked[0].headers["authorization"]
    assert asked[0].headers["x-oss-security-token"] == "temporary"
