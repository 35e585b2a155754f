"""Measures of shuffle quality: known values at both ends, and windows in between."""

import numpy as np
import pytest

from datamodules.quality import class_runs, correlation, study, total_variation


def test_correlation_of_ranks() -> None:
    places = np.arange(50)
    assert correlation(places, places**3) == pytest.approx(1.0)
    assert correlation(places, -places) == pytest.approx(-1.0)
    assert abs(correlation(places, np.random.default_rng(0).permutation(50))) < 0.5


def test_runs_and_shares_of_known_batches() -> None:
    classes = np.array([0, 0, 1, 1, 0, 1, 0, 1, 1])  # batches 0011, 0101, and a rest
    assert class_runs(classes, 4) == pytest.approx((2 + 4) / 2)
    assert total_variation(classes[:8], 4) == pytest.approx(0.0)
    assert total_variation(np.array([0, 0, 1, 1]), 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no batch"):
        class_runs(classes, 10)


def test_wider_windows_mix_better() -> None:
    stored, one, four, all_, full, prepared = study(20_000, 20, 20, 64, (1, 4, 20))
    assert [stored.name, prepared.name] == ["storage order", "window of 1, shuffled when written"]
    assert [stored.rank_correlation, stored.neighbours] == pytest.approx([1.0, 1.0])
    spread = [quality.total_variation for quality in (stored, one, four, all_)]
    assert spread == sorted(spread, reverse=True)
    assert all_.total_variation == pytest.approx(full.total_variation, abs=0.02)
    assert prepared.total_variation == pytest.approx(full.total_variation, abs=0.02)
    assert full.runs == pytest.approx(1 + 63 * 0.95, abs=0.5)
    assert stored.runs < 1.1
    assert abs(full.neighbours) < 0.05
    assert one.neighbours > 0.9
