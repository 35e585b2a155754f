"""Commands and servers that shards are fetched with: stand-ins for aws and gsutil on PATH, and a server with faults."""

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datamodules import download, remote
from datamodules.shards import BadSample, Source, open_source
from datamodules.writer import DatasetWriter
from tests.tars import sample, write_tar

# The messages are those of aws-cli 1.45 and gsutil 5.34. "once" breaks off in the middle and then goes away.
COMMANDS = {
    "s3": ("aws", '[ "$1 $2 $4" = "s3 cp -" ] || exit 2\nurl=$3', "fatal error: An error occurred (404): Key $key"),
    "gs": ("gsutil", '[ "$1 $#" = "cat 2" ] || exit 2\nurl=$2', "CommandException: No URLs matched: $url"),
}
SCRIPT = """#!/bin/sh
{url}
key=${{url#*://bucket/}}
echo "$key" >> {log}
if [ -e {once} ]; then rm {once}; head -c 20000 "{folder}/$key"; echo "Connection was closed" >&2; exit 1; fi
if [ -e {keyless} ]; then echo "Unable to locate credentials" >&2; exit 1; fi
echo "warning: slow today" >&2
[ -f "{folder}/$key" ] && exec cat "{folder}/$key"
echo "{absent} does not exist" >&2
exit 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three shards of 30 samples behind the commands; an empty cache; quick retries."""
    monkeypatch.setenv("PLATFORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(remote, "_BACKOFF_SECONDS", 0.01)
    folder = tmp_path / "a set"
    with DatasetWriter(folder, dataset="test", licence="none", sources={}) as writer:
        writer.write("train", ({"__key__": f"{i:05d}", **sample(i, i % 10)} for i in range(90)), per_shard=30)
    (tmp_path / "bin").mkdir()
    files = {name: tmp_path / name for name in ("log", "once", "keyless")}
    for name, url, absent in COMMANDS.values():
        script = SCRIPT.format(url=url, absent=absent, folder=folder, **files)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture(params=COMMANDS)
def scheme(request: pytest.FixtureRequest, folder: Path) -> str:
    return str(request.param)


def opened(address: str, **options: object) -> Source:
    return open_source(address, Path("."), "data.train", **options)  # type: ignore[arg-type]


def asked(folder: Path, name: str) -> int:
    return (folder.parent / "log").read_text().split().count(name)


def cached(folder: Path) -> list[str]:
    return sorted(path.name[17:] for path in (folder.parent / "cache" / "shards").iterdir() if path.suffix != ".lock")


def test_commands_deliver_and_fill_the_cache(scheme: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    address = f"{scheme}://bucket/train-{{000000..000002}}.tar"
    local = opened(str(folder / "train-*.tar"))
    for _ in range(2):
        source = opened(address)
        assert source.fingerprint == local.fingerprint
        assert [source.read(i) for i in (0, 45, 89)] == [local.read(i) for i in (0, 45, 89)]
        source.close()
    assert [asked(folder, name) for name in source.names] == [1] * 3
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    source = opened(address)  # another identity without index.json, so they are fetched once more
    assert source.counts.tolist() == [30] * 3
    assert source.read(45) == sample(45, 5)
    assert [asked(folder, name) for name in source.names] == [2] * 3
    source.close()
    assert capfd.readouterr().err == ""  # neither warnings of the commands nor what they say of an absent index.json


def test_commands_that_fail_tell_why(scheme: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    once, keyless = folder.parent / "once", folder.parent / "keyless"
    source = opened(f"{scheme}://bucket/train-{{000000..000002}}.tar")
    assert source.key(5) == "00005"  # so that its index file is here already
    once.touch()
    assert source.read(5) == sample(5, 5)
    assert "train-000000.tar: the command ended with status 1: Connection was closed; trying again" in caplog.text
    assert asked(folder, "train-000000.tar") == 2
    (folder / "train-000001.tar").unlink()
    for _ in range(2):
        with pytest.raises(BadSample, match=r"sample 00035: the command ended with status 1: .*does not exist"):
            source.read(35)
    assert asked(folder, "train-000001.tar") == 1  # no use in asking again
    keyless.touch()
    with pytest.raises(BadSample, match=r"sample #5: the command ended with status 1: Unable to locate credentials"):
        source.read(65)
    assert asked(folder, "train-000002.tar") == remote._ATTEMPTS
    source.close()
    assert cached(folder) == ["train-000000.tar"]
    with pytest.raises(ValueError, match=r"data.train: .*bucket/index.json cannot be fetched: .*Unable to locate cred"):
        opened(f"{scheme}://bucket/train-000000.tar")  # without the index it would be another data set


def test_commands_that_are_not_installed(scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = COMMANDS[scheme][0]
    (folder.parent / "bin" / name).unlink()
    (folder.parent / "bin" / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder.parent / "bin"))
    with pytest.raises(ValueError, match=f"cannot be fetched: the program {name} is not installed. Check"):
        opened(f"{scheme}://bucket/train-000000.tar")


@pytest.mark.parametrize(
    ("scheme", "program", "absent"),
    [
        ("sftp", "curl", "exit 78"),
        ("scp", "curl", "exit 78"),
        ("s3", "aws", "echo 'fatal error: An error occurred (403): Forbidden' >&2; exit 1"),
        ("gs", "gsutil", "echo 'AccessDeniedException: 403 x does not have storage.objects.list access' >&2; exit 1"),
    ],
)
def test_absent_in_other_words(scheme: str, program: str, absent: str, folder: Path) -> None:
    """Of servers without codes of http, and of stores that let everybody read, but not list."""
    script = "#!/bin/sh\nfor word; do case $word in *://*) name=${word##*/};; esac; done\n"
    script += f'[ -f "{folder}/$name" ] && exec cat "{folder}/$name"\n{absent}\n'
    (folder.parent / "bin" / program).write_text(script)
    (folder.parent / "bin" / program).chmod(0o755)
    (folder / "index.json").unlink()
    source = opened(f"{scheme}://bucket/train-{{000000..000002}}.tar")
    assert source.counts.tolist() == [30] * 3
    assert source.read(45) == sample(45, 5)
    source.close()


@pytest.mark.parametrize("command", ["pipe:echo $$ > {pid}; printf x; exec sleep 60", "s3://bucket/x", "gs://bucket/x"])
def test_closing_ends_the_command(command: str, folder: Path) -> None:
    pid = folder.parent / "pid"
    stop = threading.Event()
    for program in ("aws", "gsutil"):
        (folder.parent / "bin" / program).write_text(f"#!/bin/sh\necho $$ > {pid}; printf x; exec sleep 60")
    pieces = download.chunks(command.format(pid=pid), stop)
    assert next(pieces) == b"x"
    stop.set()
    with pytest.raises(download.Closed):
        next(pieces)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_own_commands(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "train-{000000..000002}.tar"
    source = opened(f"pipe:echo hello >&2; cat '{folder}/{name}' | cat")
    assert source.read(89) == sample(89, 9)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(BadSample, match=r"sample 00005: the download has 0 bytes, index.json says"):
        source.read(5)  # the last command of a pipeline has not failed
    source.close()
    source = opened(f"pipe:cat '{folder}/{name}'")
    with pytest.raises(BadSample, match=r"sample 00005: the command ended with status 1: cat: .*No such file"):
        source.read(5)
    source.close()
    assert cached(folder) == ["train-000002.tar"]
    assert "hello" not in capfd.readouterr().err


Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[[str, list[Answer]], str]]:
    """Start a server that answers the requests for one file in these ways, then as it should."""
    servers = []

    def start(name: str, answers: list[Answer]) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

            def do_GET(self) -> None:
                if self.path.endswith(name) and answers:
                    answers.pop(0)(self, (folder / name).read_bytes())
                else:
                    super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def fail(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_error(500)


def break_off(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])
    request.close_connection = True


def cut_inside_zeros(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.end_headers()  # no length, so nobody can see that it is cut
    request.wfile.write(content[:4096])


def test_servers_that_recover(folder: Path, serve: Callable[[str, list[Answer]], str]) -> None:
    url = serve("train-000001.tar", [fail])
    source = opened(f"{url}/train-{{000000..000002}}.tar")
    assert source.read(31) == sample(31, 1)  # curl itself tries again after two seconds
    source.close()
    url = serve("train-000002.tar", [break_off])
    source = opened(f"{url}/train-{{000000..000002}}.tar")
    assert source.read(61) == sample(61, 1)
    source.close()


@pytest.mark.parametrize("fault", [break_off, cut_inside_zeros])
def test_half_a_body_is_no_shard(fault: Answer, folder: Path, serve: Callable[[str, list[Answer]], str]) -> None:
    """Without an index.json that would know better."""
    (folder / "index.json").unlink()
    write_tar(folder / "a.tar", {"0": {"cls": b"1"}, "1": {"lat": bytes(40000)}, "2": {"cls": b"3"}})
    url = serve("a.tar", [fault] * remote._ATTEMPTS)
    with pytest.raises(ValueError, match=r"a.tar cannot be fetched: the (connection ended before|download is truncat)"):
        opened(f"{url}/a.tar")
    assert cached(folder) == []
    source = opened(f"{url}/a.tar")
    assert source.counts.tolist() == [3]
    source.close()
    assert cached(folder) == ["a.tar"]
