from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from callbacks.features import golden
from callbacks.features.digits import Digits
from callbacks.features.fd_lite import FdLite
from callbacks.features.frechet import Moments, Stats, frechet_distance
from callbacks.features.neighbours import knn_radii, precision_recall

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = load_file(GOLDEN / "feature_distances.safetensors")


def stats(features: torch.Tensor, rows: int = 37) -> Stats:
    moments = Moments()
    for part in features.split(rows):
        moments.update(part)
    return moments.finalize()


def test_diagonal_gaussians_have_the_closed_form():
    a, b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.0]).double()
    first, second = Stats(torch.zeros(3).double(), a.diag(), 9), Stats(torch.tensor([1.0, 0, 2]).double(), b.diag(), 9)
    expected = 5.0 + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-5)  # b is singular: jitter shows
    assert frechet_distance(second, first) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("case", "tolerance"), [("a", 1e-8), ("b", 1e-8), ("c", 2e-6)])  # c: fewer rows than columns
def test_distance_equals_recorded_values(case, tolerance):
    real, fake = stats(CASES[f"{case}.real"]), stats(CASES[f"{case}.fake"])
    expected = float(CASES[f"{case}.fid_exact"])
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=tolerance)
    shift = (real.mean - fake.mean).square().sum()
    assert float(shift) == pytest.approx(float(CASES[f"{case}.fid_mean_term"]), rel=1e-8)


def test_moments_do_not_depend_on_who_saw_what():
    features = CASES["a.real"]
    whole, parts = stats(features), [Moments() for _ in range(4)]
    for index, part in enumerate(parts[:3]):
        part.update(features[index::3])
    packed = torch.stack([part.pack() for part in parts[:3]]).sum(0)
    merged = parts[2].merge(parts[3]).merge(parts[0].merge(parts[1]))
    for other in (merged.finalize(), Moments.unpack(packed, features.shape[1]).finalize()):
        assert other.n == whole.n
        torch.testing.assert_close(other.cov, whole.cov, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(whole.cov, torch.cov(features.double().T), rtol=1e-10, atol=1e-12)


def test_features_that_mean_nothing_are_refused():
    moments = Moments()
    with pytest.raises(ValueError, match="at least 2 samples, 0 came"):
        moments.finalize()
    moments.update(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 samples, 1 came"):
        moments.finalize()
    broken = torch.ones(4, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(ValueError, match="first: row 2"):
        moments.update(broken)
    with pytest.raises(ValueError, match=r"\(5, 2\) came"):
        moments.update(torch.ones(5, 2))


def test_constant_features_have_a_distance():
    same, other = stats(torch.ones(5, 3)), stats(torch.zeros(5, 3))
    assert frechet_distance(same, other) == pytest.approx(3.0)
    assert frechet_distance(same, stats(torch.randn(500, 3))) > 0


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_precision_and_recall_equal_recorded_values(case):
    real, fake = CASES[f"{case}.real"], CASES[f"{case}.fake"]
    expected = float(CASES[f"{case}.prc_tf_k3_precision"]), float(CASES[f"{case}.prc_tf_k3_recall"])
    assert precision_recall(real, fake) == pytest.approx(expected, abs=1e-6)
    assert precision_recall(real, fake, block=7) == precision_recall(real, fake)


def test_radius_counts_other_points_only():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert knn_radii(line, 1).tolist() == [1.0, 1.0, 2.0, 4.0]
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        knn_radii(line, 4)


def test_fd_lite_replays_its_golden_file():
    path = GOLDEN / "metrics_fd_lite.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["method"] in golden.METHODS
    rows = {name: (error, tolerance) for name, error, tolerance in golden.check(tensors, metadata, path)}
    assert rows.keys() == golden.references(tensors)
    assert all(error <= tolerance for error, tolerance in rows.values()), rows
    tensors["features32"] = tensors["features32"] + 1e-2
    error, tolerance = {name: rest for name, *rest in golden.check(tensors, metadata, path)}["features32"]
    assert error > tolerance


def test_fd_lite_sees_blur_and_refuses_odd_channels():
    images = (torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    net = FdLite()
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).to(torch.uint8)
    reference, again, other = (stats(net(x).values) for x in (images[:100], images[100:], blurred[100:]))
    assert net.distance(reference, other) > 10 * net.distance(reference, again)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        net(images[:, :2])


def test_digits_classifier_scores_held_out_digits_as_documented():
    digits = load_digits()
    images = torch.tensor(digits.images * 15).to(torch.uint8)[:, None]
    labels = torch.tensor(digits.target)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[3::4]] = True  # every fourth of its class
    net = Digits()
    test, train = net(images[held_out]), net(images[~held_out])
    assert stats(train.values).mean.allclose(net.reference().mean, atol=1e-12)
    assert net.reference().n == len(train.values) == 1352
    assert net.distance(net.reference(), stats(test.values)) == pytest.approx(0.0529, abs=5e-5)
    assert precision_recall(train.hidden, test.hidden)[1] == pytest.approx(0.92, abs=0.005)
    assert float((test.predicted == labels[held_out]).double().mean()) == pytest.approx(0.989, abs=5e-4)
    shifted = (images[held_out].int() + 7).to(torch.uint8)  # less than half a grey step: quantised away
    assert torch.equal(net(shifted).values, test.values)
    with pytest.raises(ValueError, match="1x16x16 came"):
        net(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
