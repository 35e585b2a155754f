"""The shards of the copy task hold the copy task."""

from pathlib import Path

import torch

from datamodules import copytask
from datamodules.text import Text
from datamodules.tokenizers import Characters


def test_every_row_repeats_its_first_half(tmp_path: Path) -> None:
    data = Text(
        root=tmp_path / "copy",
        train="train-*.tar",
        val="val-*.tar",
        source=copytask.write,
        tokenizer=Characters(copytask.ALPHABET, eos=False),
        length=16,
        member="tok",
        add_eos=False,
        batch_size=256,
    )
    data.prepare_data()
    data.setup("fit")
    tokens = torch.cat(
        [next(iter(data.train_dataloader()))["tokens"].clone(), *(b["tokens"].clone() for b in data.val_dataloader())]
    )
    data.teardown()
    assert len(tokens) == 256 + copytask.VAL * copytask.ROWS
    assert torch.equal(tokens[:, :8], tokens[:, 8:])
    assert torch.bincount(tokens.flatten()).min() > 0.95 * tokens.numel() / 8
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
    copytask.write(tmp_path / "copy")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copy").iterdir()}
