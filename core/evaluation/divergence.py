"""How far a candidate is from its reference: KL divergence, agreement and perplexities on the same windows.

KL is per position KL(p_reference ‖ p_candidate) in nats over the whole vocabulary, in the centred form of every whose
terms is non-negative, so that differences far below the rounding of a log-softmax are still measured; networks with
identical weights give exactly 0. Logits are taken in fp32 whatever the networks compute in. Memory: the logits of one
batch of both networks, and tiles of positions; networks that are never held whole are compared by
`core.evaluation.by_blocks`. It judges nothing: what is good enough is the gate's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import InvalidCheckpoint, NonFiniteWeights
from core.evaluation.text import Windows
from core.hollow import return_memory
from core.networks import check_token_ids, next_token_logits

Progress = Callable[[float, str], None]

_TILE_ELEMENTS = 1 << 18  # of logits worked on at a time: they stay in the cache
_TILES_BETWEEN = 8  # handing memory back
_BATCH_TOKENS = 2048
_BATCH_ELEMENTS = 1 << 26  # of logits held at a time, per network, unless one sequence has more
_HEAD_ROWS = 1 << 14
_SERIES_BELOW = {torch.float32: 0.05, torch.float64: 1e-3}  # where its first missing term is below the dtype's eps
_SAFE_DIFFERENCE = 80.0
_NO_NUMBERS = "logits that are not numbers, or tokens that only the candidate excludes"


@dataclass(frozen=True)
class Metrics:
    """A comparison. KL in nats per token; `kl_mean` is the mean over sequences of `per_sequence`.

    `kl_stderr` is its standard error over sequences (0 for one sequence), `kl_median` and `kl_p99` are quantiles over
    positions; `tokens` is how many positions were compared. Perplexities are over the positions whose next token is
    known.
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    sequences: int
    tokens: int
    sequence_length: int
    per_sequence: tuple[float, ...]


@dataclass(frozen=True)
class _Compared:
    """Per sequence and position: KL (fp64), whether the likeliest tokens agree, and both losses (one less)."""

    kl: torch.Tensor
    agrees: torch.Tensor
    loss: torch.Tensor
    reference_loss: torch.Tensor


def kl_from_logits(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) over the last dimension, fp64, from logits of either in fp32 or fp64; NaN where either has one."""
    kl, plain = _centred_kl(p_logits, q_logits - p_logits)
    if plain.any():
        kl[plain] = _plain_kl(p_logits[plain], q_logits[plain])
    return kl


def kl_from_difference(p_logits: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) over the last dimension, fp64, where q's logits are p's plus `difference`."""
    kl, plain = _centred_kl(p_logits, difference)
    if plain.any():
        kl[plain] = _plain_kl(p_logits[plain], p_logits[plain].double() + difference[plain])
    return kl


def _centred_kl(p_logits: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in the centred form, and the rows for which that form is not safe.

    With d̃ = d - Σ p d: KL = log1p(Σ p (expm1(d̃) - d̃)), whose terms are all non-negative. Not safe are |d̃| > 80, where
    fp32 ends, and infinite logits.
    """
    p = p_logits.softmax(-1)
    centred = difference - (p * difference).sum(-1, keepdim=True)
    largest = centred.abs().amax(-1)
    plain = ~(largest <= _SAFE_DIFFERENCE)
    all_small = bool((largest < _SERIES_BELOW[centred.dtype]).all())
    kl = (p * _excess(centred, all_small)).sum(-1, dtype=torch.float64).log1p()
    return kl, plain


def _excess(x: torch.Tensor, all_small: bool) -> torch.Tensor:
    """e^x - 1 - x; by a series for small |x|, where expm1(x) - x cancels."""
    series = x.square() * (0.5 + x * (1 / 6 + x * (1 / 24 + x / 120)))
    return series if all_small else torch.where(x.abs() < _SERIES_BELOW[x.dtype], series, x.expm1() - x)


def _plain_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """Σ p (log p - log q) in fp64; tokens that p excludes count nothing, what is no number gives none."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_min(0)


def top_k_kl(p_logits: torch.Tensor, q_logits: torch.Tensor, k: int) -> torch.Tensor:
    """KL over the last dimension when only the reference's `k` likeliest tokens are told apart, fp64; never above KL.

    D_k = Σ_{top k of p} p (log p - log q) + p_tail (log p_tail - log q_tail), tails as log-sum-exp over the other
    tokens, so that nothing cancels.
    """
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    top = log_p.topk(min(k, log_p.shape[-1]), dim=-1).indices
    coarse_p, coarse_q = (torch.cat((one.gather(-1, top), _tail(one, top)), dim=-1) for one in (log_p, log_q))
    p = coarse_p.exp()
    return torch.where(p > 0, p * (coarse_p - coarse_q), 0.0).sum(-1)


def _tail(log_probabilities: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return log_probabilities.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)


def evaluate(
    reference: nn.Module,
    candidate: nn.Module,
    windows: Windows,
    progress: Progress,
    batch: int | None = None,
) -> Metrics:
    """Compare two networks, `batch` sequences at a time.

    InvalidCheckpoint when their vocabularies differ or the tokenizer exceeds them, NonFiniteWeights when a network's
    logits are not numbers or the candidate excludes what the reference may say.
    """
    check_token_ids(reference, windows.ids)
    check_token_ids(candidate, windows.ids)
    comparison, device = Comparison(), next(reference.parameters()).device
    with torch.inference_mode(), ExitStack() as stack:
        for network in (reference, candidate):
            stack.enter_context(float32_head(network))
        size, done = batch or 1, 0
        while done < len(windows.ids):
            progress(done / len(windows.ids), f"sequence {done + 1} of {len(windows.ids)}")
            ids = windows.ids[done : done + size].to(device)
            expected, measured = next_token_logits(reference, ids), next_token_logits(candidate, ids)
            comparison.add(expected, measured, ids)
            done += size
            size = batch or batch_size(windows.ids.shape[1], expected.shape[-1])
    return comparison.metrics()


def batch_size(length: int, vocabulary: int, elements: int = _BATCH_ELEMENTS) -> int:
    """How many sequences of that length have at most so many logits; one at least."""
    return max(1, min(_BATCH_TOKENS // length, elements // (length * vocabulary)))


@contextmanager
def float32_head(network: nn.Module) -> Iterator[None]:
    """Within it the network's last layer multiplies and answers in fp32, whatever the others compute in.

    In bf16 the rounding of the logits alone would read as a KL of 1e-3.
    """
    known: Any = network
    head = known.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype == torch.float32:
        yield
        return
    handle = head.register_forward_hook(_float32_linear)
    try:
        yield
    finally:
        handle.remove()


def _float32_linear(head: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
    weight, bias = head.weight, head.bias
    if not isinstance(weight, torch.Tensor):
        return _output
    x = inputs[0].float()
    tiles = [F.linear(x, rows.float()) for rows in torch.split(weight, _HEAD_ROWS)]
    product = torch.cat(tiles, dim=-1)
    return product if not isinstance(bias, torch.Tensor) else product + bias.float()


class Comparison:
    """Logits of the same windows compared as they come; nothing of their size is kept."""

    def __init__(self) -> None:
        self._parts: list[_Compared] = []

    def add(self, expected: torch.Tensor, measured: torch.Tensor, ids: torch.Tensor) -> None:
        """Logits (sequences, length, vocabulary) for token ids on their device. Raises what `evaluate` raises."""
        if expected.shape != measured.shape:
            raise InvalidCheckpoint(
                f"the vocabularies differ: {expected.shape[-1]} and {measured.shape[-1]} tokens", where="candidate"
            )
        rows, tiles = max(1, _TILE_ELEMENTS // expected.shape[-1]), []
        for tile in zip(
            torch.split(expected.flatten(0, 1), rows),
            torch.split(measured.flatten(0, 1), rows),
            torch.split(ids.roll(-1, dims=1).flatten(), rows),
            strict=True,
        ):
            tiles.append(_compare_tile(*tile))
            if len(tiles) % _TILES_BETWEEN == 0:
                return_memory()
        kl, agrees, *losses = (torch.cat(column).view(ids.shape).cpu() for column in zip(*tiles, strict=True))
        if not kl.isfinite().all():
            raise NonFiniteWeights(_NO_NUMBERS, where="KL")
        self._parts.append(_Compared(kl, agrees, *(loss[:, :-1] for loss in losses)))

    def metrics(self) -> Metrics:
        """Of everything that was added."""
        return _metrics(self._parts, self._parts[0].kl.shape[1])


def _compare_tile(
    expected: torch.Tensor, measured: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    expected, measured = expected.float(), measured.float()
    return (
        kl_from_logits(expected, measured),
        expected.argmax(-1) == measured.argmax(-1),
        F.cross_entropy(measured, targets, reduction="none").double(),
        F.cross_entropy(expected, targets, reduction="none").double(),
    )


def _metrics(parts: list[_Compared], length: int) -> Metrics:
    kl = torch.cat([part.kl for part in parts])
    per_sequence = kl.mean(1)
    count = len(per_sequence)
    return Metrics(
        kl_mean=float(per_sequence.mean()),
        kl_stderr=float(per_sequence.std() / count**0.5) if count > 1 else 0.0,
        kl_median=_quantile(kl, 0.5),
        kl_p99=_quantile(kl, 0.99),
        top1_agreement=float(torch.cat([part.agrees for part in parts]).double().mean()),
        perplexity=_perplexity(torch.cat([part.loss for part in parts])),
        reference_perplexity=_perplexity(torch.cat([part.reference_loss for part in parts])),
        sequences=count,
        tokens=kl.numel(),
        sequence_length=length,
        per_sequence=tuple(per_sequence.tolist()),
    )


def _perplexity(loss: torch.Tensor) -> float:
    """e to the mean loss in nats, and never more than e^709: beyond that fp64 ends, and JSON has no infinity."""
    return float(loss.mean().clamp(max=709.0).exp())


def _quantile(values: torch.Tensor, share: float) -> float:
    """The smallest value that at least that share of the values do not exceed."""
    flat = values.flatten()
    rank = max(1, math.ceil(share * flat.numel()))
    return float(flat.kthvalue(rank).values)
