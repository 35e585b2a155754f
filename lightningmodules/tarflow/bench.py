"""Speed of a training step and of sampling, beside TarFlow written the obvious way, on the same weights and inputs."""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.shared.timing import InTurn, training_step
from lightningmodules.tarflow.network import TarFlowNet
from lightningmodules.tarflow.sampler import Guidance, invert
from lightningmodules.tarflow.straightforward import Straightforward

WIDTH, BLOCKS, LAYERS, PATCH, CHANNELS, CLASSES = 128, 4, 2, 2, 3, 10
AGREE = 1e-4  # largest difference of samples, relative to 1 + max |sample|


def main(argv: list[str]) -> int:
    """Measure and print a table.

    Args:
        argv: words after ``python -m platform bench tarflow``.

    Returns:
        0; 1 if the two implementations disagree.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(
        f"width {WIDTH}, {BLOCKS} blocks x {LAYERS} layers, {CLASSES} classes, float32, batch {args.batch}, "
        f"{args.threads} thread(s), torch {torch.__version__}, seed {args.seed}; "
        f"{'CPU' if clock is time.process_time else 'wall'} seconds, best of {args.repeats}"
    )
    print(f"reference: cache grown by concatenation ({args.cache}), two passes when guided, float mask, plain AdamW")
    print(f"{'tokens':>6}  {'what':<16}{'ours':>9}{'reference':>11}{'ratio':>7}  largest difference")
    worst, seconds = 0.0, {}
    for tokens in args.tokens:
        net, bench = _network(tokens, args.seed), InTurn(clock, args.repeats)
        for what, ours, theirs, error in _measure(net, bench, args, compared=tokens <= args.reference_up_to):
            seconds[tokens, what] = ours
            worst = max(worst, error)
            ratio = f"{theirs:>11.4f}{theirs / ours:>7.2f}  {error:.1e}" if math.isfinite(theirs) else f"{'-':>11}"
            print(f"{tokens:>6}  {what:<16}{ours:>9.4f}{ratio}", flush=True)
    low, high = min(args.tokens), max(args.tokens)
    low = 256 if 256 in args.tokens and high > 256 else low
    if high > low:
        for what in ("sampling", "sampling, guided"):
            slope = math.log(seconds[high, what] / seconds[low, what]) / math.log(high / low)
            print(f"{what}: time grows as tokens^{slope:.2f} between {low} and {high} tokens")
    if worst > AGREE:
        print(f"the two disagree: {worst:.1e} > {AGREE} (relative to 1 + largest value)")
    return int(worst > AGREE)


def _measure(
    net: TarFlowNet, bench: InTurn, args: argparse.Namespace, *, compared: bool
) -> list[tuple[str, float, float, float]]:
    """(what, our seconds, reference seconds or nan, relative difference) for one network."""
    plain = Straightforward(net, pairwise=args.cache == "pair")
    image = torch.randn(args.batch, CHANNELS, net.img_size, net.img_size)
    z, y = torch.randn(args.batch, net.tokens, net.dims), torch.randint(CLASSES, (args.batch,))
    rows = []

    def row(what: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
        (mine, *other), (x, *reference) = bench(ours, theirs) if compared else bench(ours)
        error = max((float((x - y).abs().max() / (1 + y.abs().max())) for y in reference), default=0.0)
        rows.append((what, mine, other[0] if other else math.nan, error))

    for what, g in (("sampling", 0.0), ("sampling, guided", 1.0)):
        row(what, partial(_sampled, net, z, y, Guidance(1.0 + g)), partial(_plainly_sampled, plain, z, y, g))

    def our_loss() -> Tensor:
        out = net(image, y)
        return flow.nll(out.z, out.logdet).mean()

    def plain_loss() -> Tensor:
        z, _, logdet = plain.forward(image, y)
        return 0.5 * z.square().mean() - logdet.mean()

    row("training step", training_step(net, our_loss, fused=True), training_step(net, plain_loss, fused=False))
    return rows


def _sampled(net: TarFlowNet, z: Tensor, y: Tensor, guide: Guidance) -> Tensor:
    return net.unpatchify(invert(net, z, y, guide)[-1])


def _plainly_sampled(plain: Straightforward, z: Tensor, y: Tensor, g: float) -> Tensor:
    return plain.reverse(z, y, g, annealed=True)[-1]


def _network(tokens: int, seed: int) -> TarFlowNet:
    side = math.isqrt(tokens)
    if side * side != tokens or tokens < 4:
        raise ValueError(f"--tokens {tokens}: expected square numbers from 4 on, e.g. --tokens 64 256 1024.")
    torch.manual_seed(seed)
    net = TarFlowNet(CHANNELS, side * PATCH, PATCH, WIDTH, BLOCKS, LAYERS, num_classes=CLASSES)
    for parameter in net.parameters():  # away from the initial weights, at which nothing depends on the tokens
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return net


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m platform bench tarflow", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; then CPU time is measured)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, the best counts (default: 3)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="default: 64 256 1024")
    parser.add_argument("--reference-up-to", type=int, default=1024, help="tokens up to which the reference runs too")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--cache",
        choices=["list", "pair"],
        default="list",
        help="reference cache: a list concatenated anew, as apple/ml-tarflow, or pair by pair (default: list)",
    )
    return parser.parse_args(argv)
