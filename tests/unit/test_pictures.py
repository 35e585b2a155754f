import io

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.pictures import (
    CARD,
    animation,
    encode_png,
    even_columns,
    film_strip,
    grid,
    read_tiles,
    short_count,
    shrink,
    to_tiles,
    write_grid,
)


def noise(count: int, size: int, channels: int = 3) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=draws, dtype=torch.uint8)


@pytest.mark.parametrize(("count", "size", "columns"), [(80, 8, 10), (16, 64, 4), (5, 32, 3), (4, 128, 2)])
def test_tiles_come_back_from_the_file_at_their_own_size(tmp_path, count, size, columns):
    tiles = to_tiles(noise(count, size))
    drawn = grid(tiles, columns, heading="ema", details=["step 1", "guidance 1.5"], row_labels=["a", "long one"])
    (tmp_path / "g.png").write_bytes(encode_png(drawn))
    assert np.array_equal(read_tiles(tmp_path / "g.png"), tiles)
    assert drawn.pixels.shape[1] == CARD  # a card would stretch anything narrower by a fraction
    with Image.open(tmp_path / "g.png") as opened:
        assert opened.text["title"].split()[:3] == ["ema", "step", "1"]


def test_small_samples_fill_the_card_by_a_whole_factor():
    drawn = grid(to_tiles(noise(80, 8, 1)), 10, heading="ema", column_labels=[str(index) for index in range(10)])
    assert drawn.layout.scale == 4
    assert drawn.pixels.shape[1] == CARD
    large = grid(to_tiles(noise(4, 256)), 2, heading="ema")
    assert large.layout.scale == 1
    assert large.pixels.shape[1] >= 512  # never squeezed


def test_titles_and_labels_leave_ink_outside_the_tiles():
    tiles = np.full((4, 8, 8, 3), 250, np.uint8)
    bare = grid(tiles, 2, heading=" ")
    titled = grid(tiles, 2, heading="classes", details=["seeds 0-3"] * 9, row_labels=["0", "1"])
    assert (bare.pixels < 200).sum() == 0
    dark = (titled.pixels < 200).any(-1)
    layout = titled.layout
    assert dark[: layout.top].any()
    assert dark[layout.top :, : layout.left].any()  # the row labels
    assert not dark[layout.top :, layout.left :].any()
    assert layout.top > bare.layout.top  # the title took more than one line
    assert not dark[:, -3:].any()  # and did not run out of the picture


def test_same_picture_same_bytes():
    drawn = [encode_png(grid(to_tiles(noise(6, 8)), 3, heading="ema", details=["step 3"])) for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_white_of_the_data_set_is_shown_as_white():
    tiles = to_tiles(torch.tensor([0, 15, 240]).to(torch.uint8).view(3, 1, 1, 1), white=240)
    assert tiles[:, 0, 0, 0].tolist() == [0, 16, 255]


def test_film_strip_has_a_column_per_moment():
    columns = [to_tiles(noise(3, 8)) // (index + 1) for index in range(4)]
    strip = film_strip(columns, ["0", "1", "2", "1.5k"], "progress")
    assert strip.layout.columns == 4
    assert strip.layout.count == 12


@pytest.mark.parametrize(("size", "count"), [(8, 10), (256, 3), (8, 1), (16, 2)])
def test_animation_is_small_and_has_every_frame(size, count):
    frames = [to_tiles(noise(4, size)) // (index + 1) for index in range(count)]
    encoded = animation(frames, 2, [str(index) for index in range(count)])
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.format == "PNG"
        assert max(opened.size) <= 160
        assert getattr(opened, "n_frames", 1) == count


def test_shrinking_uses_the_smallest_whole_factor():
    assert shrink(to_tiles(noise(2, 64)), 30).shape[1:3] == (22, 22)
    assert shrink(to_tiles(noise(2, 8)), 30).shape[1:3] == (8, 8)


def test_grids_are_near_square_with_full_rows_if_they_can():
    assert [even_columns(count, 12) for count in (1, 4, 12, 60, 64, 7)] == [1, 2, 3, 10, 8, 3]


def test_foreign_pictures_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no layout"):
        read_tiles(tmp_path / "x.png")
    path = write_grid(tmp_path / "y.png", noise(6, 8, 1).numpy(), title="quickstart ema0.995 seeds 0-5", white=240)
    assert read_tiles(path).shape == (6, 8, 8, 3)


def test_counts_are_short():
    assert [short_count(n) for n in (0, 950, 1000, 1234, 76_800, 1_500_000)] == [
        "0",
        "950",
        "1k",
        "1.2k",
        "77k",
        "1.5M",
    ]
