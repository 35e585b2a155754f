"""Shards elsewhere: a real server that may lie, break off or be gone, and a cache that is too small for everything."""

import http.server
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datamodules import download, remote, tarindex
from datamodules.download import Lock, beside, file_name
from datamodules.remote import RemoteFiles
from datamodules.shards import BadSample, ShardSet, Source, open_source
from datamodules.writer import DatasetWriter
from tests.tars import sample

SHARD = 10240 * 7  # bytes of one shard below


class Server:
    """Serves a folder; counts requests, and spoils answers on demand."""

    def __init__(self, folder: Path) -> None:
        self.requests: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.slow = 0.0
        owner = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                owner.requests[name] += 1
                time.sleep(owner.slow)
                if owner.cut.get(name, 0) < 1:
                    super().do_GET()
                    return
                owner.cut[name] -= 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write((folder / name).read_bytes()[:20000])

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six shards of 30 samples with index.json and index files; an empty cache; quick retries."""
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_BACKOFF_SECONDS", 0.01)
    folder = tmp_path / "set"
    with DatasetWriter(folder, dataset="test", licence="none", sources={}) as writer:
        writer.write("train", ({"__key__": f"{i:05d}", **sample(i, i % 10)} for i in range(180)), per_shard=30)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    yield server
    server.stop()


def opened(where: str, **options: object) -> Source:
    return open_source(f"{where}/train-{{000000..000005}}.tar", Path("."), "data.train", **options)  # type: ignore[arg-type]


def describe_nothing(folder: Path) -> None:
    """Leave nothing but the shards."""
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name[17:] for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix != ".lock")


def test_same_samples_as_the_files(server: Server, folder: Path) -> None:
    source = opened(server.url)
    local = open_source("train-*.tar", folder, "data.train")
    assert not server.requests.keys() & set(source.names)  # index.json is enough to begin with
    assert source.fingerprint == local.fingerprint
    assert source.classes == local.classes
    assert source.key(179) == "00179"
    assert server.requests["train-000005.tar"] == 0  # the index file beside it knows the keys
    assert [source.read(i) for i in (179, 0, 61)] == [local.read(i) for i in (179, 0, 61)]
    assert source.measured(1, "members", lambda members: (len(members),), 1).tolist() == [[2]] * 30
    source.read(178)
    assert source.health() == {"cache_hits": 0.0, "cache_misses": 4.0}  # three read, one measured
    source.close()
    again = opened(server.url)
    again.read(179)
    assert again.health() == {"cache_hits": 1.0, "cache_misses": 0.0}
    again.close()


@pytest.mark.parametrize("form", ["pipe:cat {folder}/{name}", "pipe:cat '{folder}/{name}' | cat"])
def test_commands(folder: Path, form: str) -> None:
    address = form.format(folder=folder, name="train-{000000..000005}.tar")
    source = open_source(address, Path("."), "data.train")
    assert source.names == [f"train-00000{i}.tar" for i in range(6)]
    assert source.read(91) == sample(91, 1)
    assert source.classes is not None  # so its index.json was found
    source.close()


def test_without_index_json_every_shard_is_fetched_once(
    server: Server, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    describe_nothing(folder)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        source = opened(server.url)
        assert source.counts.tolist() == [30] * 6
        source.close()
    assert [server.requests[name] for name in source.names] == [1] * 6
    assert "each of 6 shards is fetched and indexed once" in caplog.text
    assert open_source("train-*.tar", folder, "data.train").fingerprint == source.fingerprint


def test_truncated_downloads_are_refused(server: Server, folder: Path, tmp_path: Path) -> None:
    server.cut = {"train-000001.tar": 1, "train-000002.tar": 99}
    source = opened(server.url)
    assert source.read(30) == sample(30, 0)
    assert server.requests["train-000001.tar"] == 2
    for _ in range(2):
        with pytest.raises(BadSample, match=r"train-000002.tar, sample 00060: the download has 20000 bytes, index"):
            source.read(60)
    assert server.requests["train-000002.tar"] == remote._ATTEMPTS  # the second time it is not asked for again
    assert copies(tmp_path) == ["train-000001.tar"]
    source.close()
    describe_nothing(folder)
    source = opened(server.url, max_bad_fraction=0.5)
    assert source.counts.tolist() == [30, 30, 0, 30, 30, 30]
    source.close()
    with pytest.raises(ValueError, match=r"train-000002.tar: the download is truncated at byte 20000: the end-of-arch"):
        opened(server.url)


def test_changed_content_is_refused(server: Server, folder: Path) -> None:
    raw = bytearray((folder / "train-000000.tar").read_bytes())
    raw[600] ^= 1
    (folder / "train-000000.tar").write_bytes(raw)
    source = opened(server.url)
    with pytest.raises(BadSample, match=r"train-000000.tar, sample 00003: the download has another sha256"):
        source.read(3)
    source.close()


def test_cache_is_bounded_and_open_files_outlive_it(server: Server, tmp_path: Path) -> None:
    gib = SHARD / 2**30
    with pytest.raises(ValueError, match=r"too small for data.train: two windows of data.window=2 shards take up to"):
        opened(server.url, window=2, cache_bytes=3 * SHARD)
    with pytest.raises(ValueError, match=r"Set data.cache_gib=0.001, or data.window=1.$"):
        opened(server.url, window=2, cache_bytes=3 * SHARD)
    assert gib < 0.001
    source = opened(server.url, window=1, cache_bytes=2 * SHARD)
    for number in range(0, 180, 30):
        source.read(number)
        assert len(copies(tmp_path)) <= 2
    before = sum(server.requests.values())
    assert source.read(121) == sample(121, 1)
    assert source.read(151) == sample(151, 1)
    assert sum(server.requests.values()) == before
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    assert source.read(122) == sample(122, 2)
    out = np.empty((2, 1), dtype=np.uint8)
    source.gather(np.array([152, 122]), "cls", out)
    assert out.tobytes() == b"22"
    source.close()


def test_expected_shards_are_fetched_ahead(server: Server, tmp_path: Path) -> None:
    source = opened(server.url, window=1, cache_bytes=3 * SHARD)

    def settled(*shards: int) -> bool:
        deadline = time.monotonic() + 20
        while copies(tmp_path) != [f"train-00000{i}.tar" for i in shards] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        return copies(tmp_path) == [f"train-00000{i}.tar" for i in shards]

    source.read(0)
    source.expect(np.arange(0, 150))  # five shards, room for three
    assert settled(0, 1, 2)
    source.read(30)
    source.read(60)
    assert source.health() == {"cache_hits": 2.0, "cache_misses": 1.0}
    source.expect(np.arange(60, 150))
    assert settled(2, 3, 4)
    source.close()


def test_close_ends_a_fetch_that_hangs(folder: Path) -> None:
    quiet = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
    threads = threading.active_count()
    address = f"http://127.0.0.1:{quiet.getsockname()[1]}/train-000000.tar"
    shard = remote._Shard(address, "train-000000.tar", remote.catalogue.ShardEntry(30, SHARD, ""))
    files = RemoteFiles([shard], "data.train", 10 * SHARD)
    files.expect([0])
    time.sleep(0.3)
    begin = time.monotonic()
    files.close()
    assert time.monotonic() - begin < 5
    assert threading.active_count() == threads
    quiet.close()


def test_one_fetcher(server: Server) -> None:
    server.slow = 0.2
    sources = [opened(server.url) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda number: sources[number % 3].read(number), range(6)))
    assert found == [sample(i, i) for i in range(6)]
    assert server.requests["train-000000.tar"] == 1
    for source in sources:
        source.close()


def hold(path: Path) -> None:
    assert Lock(path).acquire(True, threading.Event())
    path.with_name(f"{path.name}.{download.owner()}.1.part").write_bytes(b"half")
    path.with_name("ready").touch()
    time.sleep(60)


def test_dead_and_hanging_owners_are_not_waited_for(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(server.url)
    assert isinstance(source, ShardSet)
    assert isinstance(source.files, RemoteFiles)
    path = source.files._path(0)
    child = multiprocessing.get_context("fork").Process(target=hold, args=(path,))
    child.start()
    while not path.with_name("ready").exists():
        time.sleep(0.01)
    path.with_name("ready").unlink()
    assert Lock(path).acquire(False, threading.Event()) is False
    assert source.files._path(0).with_name(f"{path.name}.lock").read_text() == f"{socket.gethostname()}.{child.pid}"
    with monkeypatch.context() as patch:  # alive, without a sign of life
        patch.setattr(download, "STALLED_SECONDS", 0.0)
        os.utime(f"{path}.lock", (0, 0))
        assert Lock(path).acquire(True, threading.Event()) is True
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert source.read(0) == sample(0, 0)
    assert copies(tmp_path) == ["train-000000.tar"]  # what it left behind is gone
    source.close()


def test_server_that_is_gone(server: Server) -> None:
    with pytest.raises(ValueError, match=r"data.train='.*train-000009.tar': 1 of 1 shards are not in the index.json"):
        open_source(f"{server.url}/train-000009.tar", Path("."), "data.train")
    source = opened(server.url)
    server.stop()
    with pytest.raises(BadSample, match=r"train-000003.tar, sample #1: the host cannot be reached"):
        source.read(91)
    source.close()
    with pytest.raises(ValueError, match=r"data.train: http:.*cannot be fetched: the host cannot be reached. Check"):
        opened(server.url)


def test_addresses(tmp_path: Path) -> None:
    assert file_name("s3://b/x.tar/train-1.tar") == "train-1.tar"
    assert beside("https://h/d/a.tar?key=b.c", "index.json") == "https://h/d/index.json?key=b.c"
    assert beside("pipe:aws s3 cp s3://b/d/a.tar -", "i") == "pipe:aws s3 cp s3://b/d/i -"
    assert download._address("s3://b/a b.tar") == "pipe:aws s3 cp 's3://b/a b.tar' -"
    with pytest.raises(ValueError, match=r"addresses cannot have wildcards.*Write ranges"):
        open_source("https://h/train-*.tar", tmp_path, "data.train")
    with pytest.raises(
        ValueError, match=r"data.train='abc://h/a.tar': abc:// is not known; expected one of ais, ftps,"
    ):
        open_source("abc://h/a.tar", tmp_path, "data.train")
    with pytest.raises(ValueError, match=r"data.train mixes addresses \(https://h/a.tar\) with files \(b.tar\)"):
        open_source(["https://h/a.tar", "b.tar"], tmp_path, "data.train")


def test_index_files_are_fetched_for_plans(server: Server, folder: Path) -> None:
    for path in sorted(folder.glob("*.tar")):
        tarindex.write_sidecar(path, tarindex.scan(path), {"shape": np.full((30, 2), 8)})
    for fetched in (1, 0):
        source = opened(server.url)
        for shard in range(6):
            assert source.measured(shard, "shape", lambda members: (0, 0), 2).tolist() == [[8, 8]] * 30
            assert source.sizes(shard, "cls").tolist() == [1] * 30
        source.close()
        assert server.requests.pop("overview.safetensors", 0) == fetched  # all of them together, once
        assert not any(name.endswith(".npz") for name in server.requests)
    (folder / "overview.safetensors").unlink()
    for cached in (folder.parent / "cache").rglob("*.safetensors"):
        cached.unlink()
    source = opened(server.url)
    assert source.measured(5, "shape", lambda members: (0, 0), 2).tolist() == [[8, 8]] * 30
    source.close()
    assert sum(name.endswith(".npz") for name in server.requests) == 6
    (folder / "index.json").unlink()
    source = opened(server.url)
    assert source.counts.tolist() == [30] * 6
    source.close()
    assert not server.requests.keys() & set(source.names)
