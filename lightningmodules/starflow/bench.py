"""Speed of a training step and of sampling, beside STARFlow written the obvious way, on the same weights and inputs."""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightningmodules.shared import flow
from lightningmodules.shared.timing import InTurn, training_step
from lightningmodules.starflow import process
from lightningmodules.starflow.network import StarFlowNet
from lightningmodules.starflow.sampler import Guidance, Windows, invert
from lightningmodules.starflow.straightforward import Straightforward

WIDTH, HEAD, SHALLOW, DEEP, CHANNELS, CLASSES = 128, 64, [1, 1], 4, 4, 10
AGREE = 1e-4  # largest difference of samples, relative to 1 + max |sample|
REFERENCES = {
    "list": "lists of keys and values concatenated at every step, one pass per prediction",
    "batched": "reserved caches, both predictions in one batch, as apple/ml-starflow",
}
GUIDED, WINDOWED = "sampling, guided", "shallow windows"


def main(argv: list[str]) -> int:
    """Measure and print a table.

    Args:
        argv: words after ``python -m platform bench starflow``.

    Returns:
        0; 1 if the implementations disagree.
    """
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    layers = "+".join(map(str, [*SHALLOW, DEEP]))
    print(
        f"width {WIDTH}, head {HEAD}, {layers} layers, {CLASSES} classes, float32, batch {args.batch}, "
        f"{args.threads} thread(s), torch {torch.__version__}, seed {args.seed}; "
        f"{'CPU' if clock is time.process_time else 'wall'} seconds, best of {args.repeats}"
    )
    print(f"reference ({args.reference}): {REFERENCES[args.reference]}; keys turned and a mask made at every step")
    print(f"{'tokens':>6}  {'what':<17}{'ours':>9}{'reference':>11}{'ratio':>7}  largest difference")
    worst, seconds = 0.0, {}
    for tokens in args.tokens:
        net = _network(tokens, args.seed)
        for what, ours, theirs, error in _measure(net, InTurn(clock, args.repeats), args, tokens):
            seconds[tokens, what] = ours
            worst = max(worst, error)
            ratio = f"{theirs:>11.4f}{theirs / ours:>7.2f}  {error:.1e}" if math.isfinite(theirs) else f"{'-':>11}"
            print(f"{tokens:>6}  {what:<17}{ours:>9.4f}{ratio}", flush=True)
    _growth(args.tokens, seconds)
    if worst > AGREE:
        print(f"they disagree: {worst:.1e} > {AGREE} (relative to 1 + largest value)")
    return int(worst > AGREE)


def _growth(tokens: list[int], seconds: dict[tuple[int, str], float]) -> None:
    """How sampling time grows, as a N + b N^2: a token costs a fixed amount, and attention one per token seen."""
    low, high = min(tokens), max(tokens)
    if low == high:
        return
    for what in ("sampling", GUIDED):
        first, last = seconds[low, what], seconds[high, what]
        slope = math.log(last / first) / math.log(high / low)
        square = (last / high - first / low) / (high - low)
        linear = first / low - square * low
        print(
            f"{what}: tokens^{slope:.2f} between {low} and {high} tokens; {1e3 * linear:.3f} ms per token"
            f" + {1e6 * square:.3f} us per token and token before it"
        )


Row = tuple[str, float, float, float]


def _measure(net: StarFlowNet, timer: InTurn, args: argparse.Namespace, tokens: int) -> list[Row]:
    """(what, our seconds, reference seconds, relative difference) for one network."""
    plain, whole = Straightforward(net, args.reference == "batched"), tokens <= args.reference_up_to
    image = torch.randn(args.batch, CHANNELS, net.img_size, net.img_size)
    z = torch.randn(args.batch, net.tokens, net.dims)
    y = torch.eye(CLASSES + 1)[torch.randint(CLASSES, (args.batch,))].unsqueeze(1)
    null = torch.eye(CLASSES + 1)[[CLASSES] * args.batch].unsqueeze(1)
    rows = []
    for what, omega in (("sampling", 0.0), (GUIDED, 3.0)):
        ours = partial(_sampled, net, z, y, null, Guidance(1.0 + omega), Windows())
        theirs = partial(_plainly_sampled, plain, z, y, null, omega) if whole else None
        rows.append(_row(what, timer, ours, theirs))
    guided = Guidance(4.0)
    windowed = partial(_sampled, net, z, y, null, guided, Windows(args.window, 1e-5))
    sequential = partial(_sampled, net, z, y, null, guided, Windows())
    rows.append(_row(WINDOWED, timer, windowed, sequential))

    def our_loss() -> Tensor:
        out = net(image, y)
        return flow.nll(out.z, process.log_det(out.scales)).mean()

    def plain_loss() -> Tensor:
        last, _, scales = plain.forward(image, y)
        return 0.5 * last.square().mean() + torch.stack([scale.mean() for scale in scales]).sum()

    step, slow = (training_step(net, loss, fused=loss is our_loss) for loss in (our_loss, plain_loss))
    rows.append(_row("training step", timer, step, slow if whole else None))
    return rows


def _row(what: str, timer: InTurn, ours: Callable[[], Tensor], theirs: Callable[[], Tensor] | None) -> Row:
    (mine, *other), (x, *reference) = timer(ours) if theirs is None else timer(ours, theirs)
    error = max((float((x - y).abs().max() / (1 + y.abs().max())) for y in reference), default=0.0)
    return what, mine, other[0] if other else math.nan, error


def _sampled(net: StarFlowNet, z: Tensor, y: Tensor, null: Tensor, guide: Guidance, windows: Windows) -> Tensor:
    return invert(net, z, y, null, guide, windows=windows)[-1]


def _plainly_sampled(plain: Straightforward, z: Tensor, y: Tensor, null: Tensor, omega: float) -> Tensor:
    return plain.reverse(z, y, null, omega)[-1]


def _network(tokens: int, seed: int) -> StarFlowNet:
    side = math.isqrt(tokens)
    if side * side != tokens or tokens < 4:
        raise ValueError(f"--tokens {tokens}: expected square numbers from 4 on, e.g. --tokens 256 1024 4096.")
    torch.manual_seed(seed)
    layers = [*SHALLOW, DEEP]
    net = StarFlowNet(
        CHANNELS, side, 1, WIDTH, len(layers), layers, HEAD, pt_seq_len=32, txt_size=1, txt_dim=CLASSES + 1
    )
    for parameter in net.parameters():  # away from the initial weights, at which nothing depends on the tokens
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return net


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m platform bench starflow", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; then CPU time is measured)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, the best counts (default: 3)")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: 4)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="default: 64 256 1024")
    parser.add_argument("--reference-up-to", type=int, default=1024, help="tokens up to which the reference runs too")
    parser.add_argument("--reference", choices=list(REFERENCES), default="list", help="how it samples (default: list)")
    parser.add_argument("--window", type=int, default=16, help="tokens of a window in the shallow blocks (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    return parser.parse_args(argv)
