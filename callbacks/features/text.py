"""Numbers about generated text that need no model: entropy, diversity, weights of perplexity, pass@k."""

import ast
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

Tokens = Sequence[int]


def unigram_entropy(tokens: Tensor) -> Tensor:
    """Entropy of each sequence's own token counts.

    Repetition lowers the perplexity under another model and this number with it, so the two are reported together.

    Args:
        tokens: (B, L) integers.

    Returns:
        (B,) float64, nats.

    Source: the sample entropy of kuleshov-group/mdlm and s-sahoo/duo.
    """
    ordered = tokens.sort(dim=1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = torch.zeros(ordered.shape, dtype=torch.float64, device=tokens.device)
    counts.scatter_add_(1, new.cumsum(1) - 1, torch.ones_like(counts))
    share = counts / tokens.shape[1]
    return -torch.special.xlogy(share, share).sum(1)


def distinct(sequences: Sequence[Tokens], n: int) -> tuple[float, float]:
    """Share of different n-grams.

    Args:
        sequences: token ids, one list per sample; samples shorter than ``n`` count for nothing.
        n: length of the n-grams, >= 1.

    Returns:
        Over all samples together (``corpus``), and the mean over samples; both 0 without any n-gram.

    Source: arXiv 1510.03055.
    """
    everything: set[tuple[int, ...]] = set()
    total, shares = 0, []
    for sequence in sequences:
        grams = list(zip(*(sequence[offset:] for offset in range(n)), strict=False))
        if not grams:
            continue
        own = set(grams)
        everything |= own
        total += len(grams)
        shares.append(len(own) / len(grams))
    return (len(everything) / total, sum(shares) / len(shares)) if total else (0.0, 0.0)


def scored_targets(tokens: Tensor, eos: int | None) -> Tensor:
    """Which targets count in generative perplexity: all but the end-of-text tokens behind the first one.

    Args:
        tokens: (B, L) integers; token 0 is never a target.
        eos: the end-of-text token, or None where there is none.

    Returns:
        (B, L - 1) bool, one per target 1..L-1.

    Source: s-sahoo/duo, generative perplexity (non-end tokens behind the first end still count).
    """
    if eos is None:
        return torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    ends = tokens == eos
    first = ends & (ends.cumsum(1) == 1)
    return (~ends | first)[:, 1:]


def perplexity(nll: Tensor, counted: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood over counted targets.

    Args:
        nll: (B, L - 1) nats.
        counted: (B, L - 1) bool.
    """
    weight = counted.double()
    return float(((nll.double() * weight).sum() / weight.sum()).exp())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k answers drawn without replacement from n, of which c are right, is right.

    Source: arXiv 2107.03374, equation 1, in its product form.
    """
    if n - c < k:
        return 1.0
    wrong = 1.0
    for drawn in range(n - c + 1, n + 1):
        wrong *= 1.0 - k / drawn
    return 1.0 - wrong


def parses(source: str) -> bool:
    """Whether a text is syntactically valid Python with at least one statement; nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            return bool(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def lines_parse(source: str) -> bool:
    """Whether a window of a program parses, less the lines it cuts, the first and the last, and less indentation.

    Compare with the share of windows of real programs: statements that take several lines are still cut.
    """
    return parses(textwrap.dedent("\n".join(source.split("\n")[1:-1])))


def repeats(text: str) -> bool:
    """Whether the second half of a text repeats the first."""
    half, odd = divmod(len(text), 2)
    return not odd and text[:half] == text[half:]


def names_a_character(text: str) -> bool:
    """Whether a text is the name of a character, alone or in a list of names, one per line."""
    lines = text.split("\n")
    try:
        return all(unicodedata.lookup(line) for line in lines if line) and any(lines)
    except KeyError:
        return False
