"""The child process of ``execution``: takes a program on standard input and runs it with as few rights as possible.

Started as a script with the arguments seconds, MiB and a file descriptor, in an empty temporary folder. It writes
"done" to the descriptor when the program has run to its end.
"""

import ctypes
import importlib
import os
import resource
import sys
from collections.abc import Iterable
from typing import Any

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # linux/sched.h
_PROCESSES = ("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.")
_OUTSIDE = ("socket.", "ftplib.", "urllib.", "ctypes.", "signal.", "shutil.", "sqlite3.")  # SQLite opens files in C
_RIGHTS = ("os.chmod", "os.chown", "os.symlink", "os.link", "os.setxattr", "os.removexattr")
_LISTS = ("os.listdir", "os.scandir")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.chdir", "os.utime")
# No audit event tells of what these do, so a program gets neither the functions nor the modules. There is no limit of
# processes for root, and a child started unseen would be watched by nobody.
_UNSEEN = {
    "_posixsubprocess": ["fork_exec"],
    "posix": ["chroot", "mkfifo", "mknod"],
    "os": ["chroot", "mkfifo", "mknod"],
    "_signal": ["pidfd_send_signal"],
    "signal": ["pidfd_send_signal"],
}
_UNSEEN_MODULES = ("_dbm", "_gdbm", "readline", "_xxsubinterpreters", "_interpreters", *_UNSEEN)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def main(seconds: int, mebibytes: int, receipt: int) -> None:
    """Confine this process, then run the program; the audit hook comes last, because nothing can undo it."""
    _leave_the_network()
    limits = {"CPU": seconds, "AS": mebibytes << 20, "FSIZE": 16 << 20, "CORE": 0, "NOFILE": 64, "NPROC": 0}
    for kind, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (limit, limit))
    program = compile(sys.stdin.read(), "program.py", "exec")
    sys.stdin = open(os.devnull)  # noqa: SIM115 - stays open
    for module, names in _UNSEEN.items():
        for name in names:
            setattr(importlib.import_module(module), name, _refused)
    sys.addaudithook(_watch(os.path.realpath(os.getcwd())))
    exec(program, {"__name__": "__main__"})
    sys.stdout.flush()
    os.write(receipt, b"done")


def _leave_the_network() -> None:
    """Enter a network without an interface, where the kernel lets us; the audit hook refuses sockets besides."""
    try:
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_NETWORK):
            libc.unshare(_NEW_USER | _NEW_NETWORK)
    except (OSError, AttributeError):
        return


def _refused(*arguments: Any, **keywords: Any) -> None:
    raise PermissionError("this is not allowed here")


def _watch(folder: str) -> Any:
    library = [os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix) if path]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_PROCESSES + _OUTSIDE + _RIGHTS):
            raise PermissionError(f"{event} is not allowed here")
        if event == "import" and arguments[0] in _UNSEEN_MODULES:
            raise ImportError(f"{arguments[0]} is not to be had here")
        if event == "open" and not isinstance(arguments[0], int):
            if arguments[1] is None and os.path.isdir(arguments[0]):  # with dir_fd=, names of files escape the check
                raise PermissionError("os.open of a folder is not allowed here")
            writes = any(letter in (arguments[1] or "") for letter in "wax+") or (arguments[2] or 0) & _WRITING
            _check(arguments[:1], [folder] if writes else [folder, *library])
        elif event in _LISTS:
            _check(arguments, [folder, *library])
        elif event in _CHANGES:
            _check(arguments, [folder])

    return watch


def _check(paths: Iterable[Any], roots: list[str]) -> None:
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            full = os.path.realpath(os.fsdecode(path))
            if not any(full == root or full.startswith(root + os.sep) for root in roots):
                raise PermissionError(f"{full} is outside the temporary folder")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
