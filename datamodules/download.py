"""Fetch one remote file through webdataset's openers: no silent truncation, no endless wait, never two at once."""

import contextlib
import errno
import fcntl
import os
import re
import select
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from webdataset.gopen import gopen, gopen_gsutil, gopen_schemes

from datamodules import catalogue
from datamodules.catalogue import ShardEntry
from datamodules.tarindex import BLOCK, scan_open

STALLED_SECONDS = 60.0  # a source that sends nothing for so long is given up
_POLL_SECONDS = 0.25
_CHUNK = 1 << 20
_SMALL = 2**28  # bytes
_FILE_NAME = re.compile(r"[^/\s?&=#'\"]+\.tar(?![^/\s?&#'\"]*\.tar)")
_BY_CURL = {"http", "https", "hf", "sftp", "ftps", "scp"}
_CURL = {
    3: "the address is malformed",
    6: "the host is not known",
    7: "the host cannot be reached",
    18: "the connection ended before the file did",
    22: "the server answered with an error, e.g. 404 not found",
    28: "the connection timed out",
    78: "the file is not there",
}
_NOT_INSTALLED = 127  # a shell's exit status for a command that it does not find
_MISSING = {22, 78}  # exit statuses of curl for http and hf, and for sftp, ftps and scp
# 403 is also what a store says of an absent file to those who may read, but not list.
_NOT_THERE = re.compile(r"\b40[34]\b|NoSuchKey|does not exist|URLs? matched|No such file", re.IGNORECASE)
_TOLD = 300  # characters of a command's last message that are passed on


class Absent(OSError):
    """The other side answered, and does not have the file."""


class Closed(OSError):
    """The fetch was given up because nobody waits for it any more."""


def check(url: str, setting: str) -> None:
    """Refuse an address that nothing opens.

    Raises:
        ValueError: its kind is not known.
    """
    kind = url.partition(":")[0]
    if kind not in gopen_schemes and kind != "s3":
        known = sorted({"s3", *gopen_schemes} - {"__default__", "pipe"})
        raise ValueError(
            f"{setting}='{url}': {kind}:// is not known; expected one of {', '.join(known)}. "
            "Or write pipe: and a command that prints the shard, as in pipe:ssh host cat /data/train-{000..009}.tar"
        )


def tells_absent(url: str) -> bool:
    """Whether an absent file can be told from other trouble; what a command of the user says may mean anything."""
    return url.partition(":")[0] in _BY_CURL | {"s3", "gs"}


def chunks(url: str, stop: threading.Event) -> Iterator[bytes]:
    """Content of a remote file, piece by piece.

    Args:
        url: http://, https://, s3://, gs://, hf:// ... or pipe:COMMAND.
        stop: give up when this is set.

    Raises:
        OSError: it cannot be had, or not all of it; with what a command has last said.
    """
    address = _address(url)
    with tempfile.NamedTemporaryFile(prefix="download-") as said:
        if address.startswith("pipe:"):
            place = "" if url.startswith("pipe:") else "exec "  # that of the shell, so that killing it ends the command
            address = f"pipe:exec 2>{shlex.quote(said.name)}; {place}{address[5:]}"
        try:
            stream = gopen(address, "rb")
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, f"the program {error.filename} is not installed") from error
        process = getattr(stream, "proc", None)
        file = getattr(stream, "stream", stream)
        try:
            yield from _pieces(file.fileno(), stop)
            status = process.wait(STALLED_SECONDS) if process is not None else 0
            if status:
                raise _failure(url, status, said)
        finally:
            if process is not None and process.poll() is None:
                process.kill()
            file.close()
            if process is not None:
                process.wait()


def _failure(url: str, status: int, said: IO[bytes]) -> OSError:
    """What the exit status of a command means, and its last words."""
    if url.partition(":")[0] in _BY_CURL:
        kind = Absent if status in _MISSING else OSError
        return kind(errno.EIO, _CURL.get(status, f"curl ended with status {status}"))
    words = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    last = words[-1][:_TOLD] if words else ""
    if status == _NOT_INSTALLED and not url.startswith("pipe:"):
        return FileNotFoundError(errno.ENOENT, f"the program {_address(url)[5:].split()[0]} is not installed")
    kind = Absent if _NOT_THERE.search(last) else OSError
    return kind(errno.EIO, f"the command ended with status {status}" + (f": {last}" if last else ""))


def small(url: str, stop: threading.Event) -> bytes:
    """Content of a small remote file.

    Args:
        url: as ``chunks`` takes it.
        stop: give up when this is set.

    Raises:
        OSError: it cannot be had, or it is larger than index files ever are.
    """
    content = bytearray()
    for data in chunks(url, stop):
        content += data
        if len(content) > _SMALL:
            raise OSError(errno.EFBIG, "too large")
    return bytes(content)


def check_whole(size: int, digest: str, entry: ShardEntry | None, file: int) -> None:
    """Refuse a shard that did not arrive whole.

    Args:
        size: bytes that came.
        digest: their sha256.
        entry: what index.json says about it, or None.
        file: descriptor of the copy.

    Raises:
        OSError: it is not the one of index.json, or ends before the blocks that end a tar, or inside a member.
    """
    if entry is None:
        if size < 2 * BLOCK or os.pread(file, 2 * BLOCK, size - 2 * BLOCK).strip(b"\0"):
            raise OSError(errno.EIO, f"the download is truncated at byte {size}: the end-of-archive blocks are missing")
        if (problem := scan_open(file).problem).startswith("truncated"):  # it was cut inside zeros
            raise OSError(errno.EIO, f"the download is {problem}")
    elif digest != entry.sha256:
        raise OSError(errno.EIO, f"the download has another sha256 than {catalogue.FILE_NAME} says")


def file_name(url: str) -> str:
    """Name of the shard that an address or a command fetches."""
    found = _FILE_NAME.findall(url)
    return str(found[-1]) if found else re.sub(r"[^\w.-]+", "_", url)[-80:]


def beside(url: str, name: str) -> str:
    """Address of another file in the folder of a shard: the name is replaced, all else stays."""
    found = list(_FILE_NAME.finditer(url))
    if not found:
        return f"{url}/{name}"
    return url[: found[-1].start()] + name + url[found[-1].end() :]


def _pieces(file: int, stop: threading.Event) -> Iterator[bytes]:
    poll = select.poll()
    with contextlib.suppress(PermissionError):
        poll.register(file, select.POLLIN | select.POLLHUP)
    last = time.monotonic()
    while True:
        if stop.is_set():
            raise Closed(errno.ECANCELED, "closed")
        if not poll.poll(1000 * _POLL_SECONDS):
            if time.monotonic() - last > STALLED_SECONDS:
                raise OSError(errno.ETIMEDOUT, f"nothing came for {STALLED_SECONDS:.0f} s")
            continue
        data = os.read(file, _CHUNK)
        if not data:
            return
        last = time.monotonic()
        yield data


def _address(url: str) -> str:
    """What webdataset opens; it has no opener for s3:// of its own, and that for gs:// lets gsutil print its errors."""
    if url.startswith("s3://") and "s3" not in gopen_schemes:
        return f"pipe:aws s3 cp {shlex.quote(url)} -"
    if url.startswith("gs://") and gopen_schemes["gs"] is gopen_gsutil and "GOPEN_REWRITE" not in os.environ:
        return f"pipe:gsutil cat {shlex.quote(url)}"
    return url


class Lock:
    """Lets one process or thread of this machine work on a file; the kernel releases it when its owner dies.

    The lock file names its owner and is touched while the work goes on. An owner that hangs, or one on another
    machine whose file system keeps the lock for it, is waited for no longer than ``STALLED_SECONDS`` without a sign of
    life. Working on a file twice is a waste, never an error.

    Args:
        path: the file to be worked on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.lock")
        self._file = -1

    def acquire(self, wait: bool, stop: threading.Event) -> bool:
        """Take the lock. Returns False, if ``wait`` is false and somebody else has it.

        Raises:
            OSError: it was closed meanwhile, or the lock file cannot be made.
        """
        while not self._try():
            if not wait:
                return False
            if self._stale():
                return True
            if stop.wait(_POLL_SECONDS):
                raise Closed(errno.ECANCELED, "closed")
        return True

    def touch(self) -> None:
        """Give a sign of life."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def release(self) -> None:
        """Let the next one in."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._file)
            self._file = -1

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_ino != os.stat(self.path).st_ino:  # its last owner has just removed it
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return False
        except OSError:  # a file system without locks
            os.close(file)
            return True
        os.ftruncate(file, 0)
        os.write(file, owner().encode())
        self._file = file
        return True

    def _stale(self) -> bool:
        try:
            return time.time() - self.path.stat().st_mtime > STALLED_SECONDS
        except OSError:
            return False


def owner() -> str:
    """Host and process, as they stand in the names of unfinished files."""
    return f"{socket.gethostname()}.{os.getpid()}"


def abandoned(part: Path) -> bool:
    """Whether an unfinished file ``<name>.<host>.<process>.<thread>.part`` has lost its owner."""
    host, process, _ = part.name.removesuffix(".part").rsplit(".", 2)
    try:
        if not host.endswith(f".{socket.gethostname()}") or not process.isdigit():
            return time.time() - part.stat().st_mtime > 60 * STALLED_SECONDS
        os.kill(int(process), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:
        return False
    return False


def write_all(file: int, data: bytes) -> None:
    """Write all of it."""
    view: Any = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
