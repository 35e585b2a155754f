"""``board``: TensorBoard with the settings that keep every picture."""

import argparse
import errno
import os
import socket
import sys
from pathlib import Path

FIRST_PORT, TRIES = 6006, 50
# TensorBoard keeps ten random pictures per tag unless told otherwise, and often drops the first one.
SAMPLES = "images=1000,text=500"


def run(args: argparse.Namespace) -> int:
    """Become TensorBoard; does not return when all is well.

    Args:
        args: ``runs`` (folder), ``port`` (int or None), ``host``.

    Raises:
        ValueError: no such folder, or the port is taken.
    """
    folder = Path(args.runs)
    if not folder.is_dir():
        here = sorted(path.parent.parent.name for path in Path().glob("*/*/config.yaml"))
        known = f" Folders with runs here: {', '.join(dict.fromkeys(here))}." if here else ""
        raise ValueError(
            f"{folder} is not a folder (seen from {Path.cwd()}).{known} Type board FOLDER, or start a run."
        )
    port = args.port or free_port(args.host)
    if not _is_free(args.host, port):
        raise ValueError(
            f"--port {port} is in use on {args.host}. Leave --port out, or type --port {free_port(args.host)}."
        )
    print(f"TensorBoard of {folder.resolve()}: http://{args.host}:{port}/  (Ctrl-C ends it)", flush=True)
    os.execv(sys.executable, command(folder, args.host, port))


def command(folder: Path, host: str, port: int) -> list[str]:
    """The words that start TensorBoard."""
    return [
        *(sys.executable, "-m", "tensorboard.main"),
        *("--logdir", str(folder.resolve())),
        *("--host", host, "--port", str(port)),
        *("--samples_per_plugin", SAMPLES),
    ]


def free_port(host: str) -> int:
    """The first port from 6006 that nobody listens on.

    Raises:
        ValueError: all of those tried are taken, or the address is not one of this machine's.
    """
    for port in range(FIRST_PORT, FIRST_PORT + TRIES):
        if _is_free(host, port):
            return port
    raise ValueError(f"no port from {FIRST_PORT} to {FIRST_PORT + TRIES - 1} is free on {host}. Type --port N.")


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: {error.strerror}. Leave --host out for 127.0.0.1.") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"--host {host} is not an address of this machine. Leave --host out for 127.0.0.1."
                ) from None
            return False
    return True
