"""Speed of CADD beside its masked baseline, and of both beside masked diffusion written the obvious way."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightningmodules.cadd.module import Cadd
from lightningmodules.cadd.network import CaddNet
from lightningmodules.cadd.oracle import ExactDenoiser, Oracle, copy_task, one_token
from lightningmodules.cadd.process import Estimator
from lightningmodules.cadd.sampler import LatentMotion
from lightningmodules.cadd.straightforward import Straightforward
from lightningmodules.shared.codecs import Tokens
from lightningmodules.shared.masking import corrupt
from lightningmodules.shared.noise import SampleNoise
from lightningmodules.shared.samplers.masked import Draw, Plan, reveal
from lightningmodules.shared.timing import InTurn

HEAD_DIM, COND = 32, 64
ESTIMATORS: tuple[Estimator, ...] = ("hard", "soft", "sampled")
AGREE = 1e-4  # largest difference of logits, relative to 1 + the largest
MOST_STEP, MOST_SAMPLING = 1.10, 1.05  # of the baseline's cost that CADD may take


def main(argv: list[str]) -> int:
    """Measure and print two tables.

    Args:
        argv: words after ``python -m platform bench cadd``.

    Returns:
        0; 1 if the two implementations of masked diffusion disagree.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    if args.oracle:
        _ceiling(args.oracle, args.seed)
        _one_token(args.oracle, args.seed)
        return 0
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(
        f"width {args.width}, {args.blocks} blocks, vocabulary {args.vocabulary} and a mask, {args.length} tokens, "
        f"float32, batch {args.batch}, {args.steps} steps, {args.threads} thread(s), torch {torch.__version__}, "
        f"seed {args.seed}; "
        f"{'CPU' if clock is time.process_time else 'wall'} seconds, best of {args.repeats}"
    )
    bench = InTurn(clock, args.repeats)
    on, off = _room(args, "on"), _room(args, "off")
    _against_baseline(bench, args, on, off)
    return _against_obvious(bench, args, off)


def _ceiling(rows: int, seed: int) -> None:
    """What no training can surpass: share of valid rows of the copy task under the exact denoiser."""
    oracle, length = copy_task(), 16
    print(f"copy task, exact denoiser, {rows} rows, seeds from {seed}, c = 1: share of valid rows, unigram entropy")
    print(f"{'steps':>5}{'masked':>8}{'closed':>8}" + "".join(f"{name:>16}" for name in ESTIMATORS))
    for steps in (2, 4, 8, 16, 32, 64):
        found = []
        for kind in (None, *ESTIMATORS):
            tokens = _exact(oracle, kind, steps, (rows, length), seed)
            valid = (tokens[:, : length // 2] == tokens[:, length // 2 :]).all(dim=1).double().mean()
            counts = torch.bincount(tokens.flatten(), minlength=oracle.vocabulary).double() / tokens.numel()
            found.append((float(valid), float(-torch.special.xlogy(counts, counts).sum())))
        closed = (1 - (1 - 1 / oracle.vocabulary) / steps) ** (length // 2)
        rest = "".join(f"{valid:>8.3f} ({entropy:.3f})" for valid, entropy in found[1:])
        print(f"{steps:>5}{found[0][0]:>8.3f}{closed:>8.3f}{rest}", flush=True)


def _one_token(rows: int, seed: int) -> None:
    """Whether the samplers draw from the truth when there is nothing to coordinate."""
    oracle, length = one_token(), 100
    draws = rows * length
    print(f"\none token of {oracle.vocabulary}, exact denoiser, {draws} draws: total variation to its distribution")
    print(f"{'steps':>5}" + "".join(f"{name:>9}" for name in ESTIMATORS))
    for steps in (2, 4, 16, 64):
        off = []
        for kind in ESTIMATORS:
            tokens = _exact(oracle, kind, steps, (rows, length), seed)
            share = torch.bincount(tokens.flatten(), minlength=oracle.vocabulary).double() / tokens.numel()
            off.append(0.5 * float((share - oracle.prob).abs().sum()))
        print(f"{steps:>5}" + "".join(f"{value:>9.4f}" for value in off), flush=True)


def _exact(oracle: Oracle, kind: Estimator | None, steps: int, shape: tuple[int, int], seed: int) -> Tensor:
    """Rows drawn with the exact denoiser, one seed each; ``kind`` None is plain masked diffusion."""
    noise = SampleNoise(range(seed, seed + shape[0]))
    model = ExactDenoiser(oracle, noise, shape, None if kind is None else LatentMotion(kind))
    blank = torch.full(shape, oracle.vocabulary)
    free = torch.ones_like(blank, dtype=torch.bool)
    return reveal(model, blank, free, noise, Plan(model.schedule, steps), Draw()).tokens


def _against_baseline(bench: InTurn, args: argparse.Namespace, on: Cadd, off: Cadd) -> None:
    batch = {"tokens": torch.randint(args.vocabulary, (args.batch, args.length))}
    print(f"\n{'CADD':<28}{'CADD':>9}{'baseline':>10}{'ratio':>7}  goal")
    (ours, theirs), _ = bench(_step(on, batch), _step(off, batch))
    print(f"{'training step':<28}{ours:>9.4f}{theirs:>10.4f}{ours / theirs:>7.3f}  <= {MOST_STEP}")
    for estimator in ESTIMATORS:
        (ours, theirs), _ = bench(
            _sampler(on, args, estimator=estimator, cache=False), _sampler(off, args, cache=False)
        )
        per = 1.0 / args.steps
        what = f"sampling, per step ({estimator})"
        print(f"{what:<28}{ours * per:>9.4f}{theirs * per:>10.4f}{ours / theirs:>7.3f}  <= {MOST_SAMPLING}")


def _against_obvious(bench: InTurn, args: argparse.Namespace, off: Cadd) -> int:
    assert isinstance(off.net, CaddNet)
    plain, length = Straightforward(off.net, off.codec.mask_id), args.length
    x0 = torch.randint(args.vocabulary, (args.batch, length))
    t = (torch.arange(args.batch) + 0.5) / args.batch
    masked = torch.rand(x0.shape) < t[:, None]
    print(f"\n{'masked diffusion':<28}{'ours':>9}{'obvious':>10}{'ratio':>7}")
    batch = {"tokens": x0}
    optimizer = torch.optim.AdamW(off.net.parameters(), lr=0.0)

    def obvious() -> Tensor:
        value = plain.loss(x0, masked, t)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    (ours, theirs), _ = bench(_step(off, batch), obvious)
    print(f"{'training step':<28}{ours:>9.4f}{theirs:>10.4f}{theirs / ours:>7.2f}")
    evaluations = 0

    def sampled() -> Tensor:
        nonlocal evaluations
        tokens, evaluations = plain.sample(args.batch, length, args.steps)
        return tokens

    (ours, theirs), _ = bench(_sampler(off, args), sampled)
    assert off.evaluations is not None
    print(f"{'sampling':<28}{ours:>9.4f}{theirs:>10.4f}{theirs / ours:>7.2f}")
    count = args.batch * length
    print(f"{'  tokens per second':<28}{count / ours:>9.0f}{count / theirs:>10.0f}")
    print(f"{'  evaluations per sequence':<28}{float(off.evaluations.float().mean()):>9.1f}{evaluations:>10.1f}")
    with torch.no_grad():
        tokens, sigma = corrupt(x0, masked, off.codec.mask_id), torch.zeros(args.batch)
        reference = plain.logits(tokens, sigma)
        error = float((off.net(tokens) - reference).abs().max() / (1 + reference.abs().max()))
    print(f"largest difference of logits {error:.1e}")
    return int(error > AGREE)


class _Numbers:
    def __init__(self, size: int) -> None:
        self.size = size

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


def _room(args: argparse.Namespace, latent: Any) -> Cadd:
    room = Cadd(
        net=partial(
            CaddNet,
            hidden=args.width,
            blocks=args.blocks,
            heads=args.width // HEAD_DIM,
            cond_dim=COND,
            length=args.length,
            dropout=0.0,
        ),
        codec=Tokens(_Numbers(args.vocabulary), args.length),
        optimizer=torch.optim.AdamW,
        latent=latent,
        time_conditioning=False,
    )
    room.run_seed = args.seed
    room.configure_model()
    with torch.no_grad():  # away from the initial weights, at which nothing depends on the tokens
        for parameter in room.net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return room


def _step(room: Cadd, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward, backward and AdamW; the learning rate is 0 so that every step starts from the same weights."""
    optimizer = torch.optim.AdamW(room.net.parameters(), lr=0.0, fused=True)

    def step() -> Tensor:
        room.train()
        torch.manual_seed(0)
        value = room.loss(batch)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def _sampler(room: Cadd, args: argparse.Namespace, **settings: Any) -> Callable[[], Tensor]:
    def sample() -> Tensor:
        room.eval()
        return room.sample(range(args.batch), steps=args.steps, **settings)

    return sample


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m platform bench cadd", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; then CPU time is measured)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, the best counts (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--steps", type=int, default=64, help="sampling steps (default: 64)")
    parser.add_argument("--width", type=int, default=128, help=f"of the network, times {HEAD_DIM} (default: 128)")
    parser.add_argument("--blocks", type=int, default=4, help="of the network (default: 4)")
    parser.add_argument("--vocabulary", type=int, default=256, help="tokens (default: 256)")
    parser.add_argument(
        "--oracle",
        type=int,
        nargs="?",
        const=1000,
        metavar="ROWS",
        help="instead: the copy task under the exact denoiser, the ceiling of every trained one (rows: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    return parser.parse_args(argv)
