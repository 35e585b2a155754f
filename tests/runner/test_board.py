"""``board``: TensorBoard on loopback, with every picture."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from pathlib import Path

import pytest

from platform import board

ROOT = Path(__file__).resolve().parents[2]


def test_ports_in_use_are_noticed(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"--port {port} is in use on 127.0.0.1. Leave --port out, or type --port"
        ):
            board.run(Namespace(runs=str(tmp_path), port=port, host="127.0.0.1"))


def test_missing_folder_names_folders_with_runs(tmp_path, monkeypatch):
    (tmp_path / "results" / "quickstart").mkdir(parents=True)
    (tmp_path / "results" / "quickstart" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"runs is not a folder .* Folders with runs here: results. Type board FOLDER"):
        board.run(Namespace(runs="runs", port=None, host="127.0.0.1"))


def read(address: str, deadline: float) -> str:
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_every_picture_is_served(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(25):
            writer.add_image("samples/ema", torch_image(step), step)
    words = [sys.executable, "-m", "platform", "board", str(tmp_path)]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = server.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert str(tmp_path) in line
        deadline = time.monotonic() + 60
        pictures: list = []
        while len(pictures) < 25 and time.monotonic() < deadline:
            query = f"{address}data/plugin/images/images?run=run&tag=samples/ema&sample=0"
            try:
                pictures = json.loads(read(query, deadline))
            except (urllib.error.HTTPError, json.JSONDecodeError):  # not loaded yet
                pictures = []
            time.sleep(0.3)
        assert [picture["step"] for picture in pictures] == list(range(25))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def torch_image(step: int):
    import torch

    return torch.full((1, 8, 8), step / 25)
