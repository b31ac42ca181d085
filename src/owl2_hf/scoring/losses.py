"""Losses of scorers, as plain functions: they fit any Trainer's `compute_loss_func` or
`compute_loss`.

Source: DeQA-Score (arXiv:2501.11561, section 3.3) and its released code. B: rows, L: positions, V:
embedding rows, K: levels, best first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
_TINY = 1e-8  # under the roots, as in the released code, so that the gradient stays finite
_FLOOR = 0.01  # probability outside the levels below which the gradient is 0
PAIR_LOSSES = ("fidelity", "bce")


def level_positions(labels: Tensor, prefix: Sequence[int]) -> Tensor:
    """Where the level stands in each row: right behind the first tokens of the answer.

    Args:
        labels: (B, L), -100 where nothing is learned.
        prefix: Ids of the answer in front of the level, for instance of `The quality of the image
            is`.

    Returns:
        (B,) positions in the labels; the logits that predict a level stand one before.

    Raises:
        ValueError: If a row does not hold the prefix with a label behind it.
    """
    length = max(len(prefix), 1)
    if length >= labels.shape[1]:
        raise ValueError(
            f"expected labels longer than the {length} tokens before the level, got "
            f"{labels.shape[1]}."
        )
    windows = labels[:, :-1].unfold(1, length, 1)  # (B, windows, length)
    if prefix:
        # Number by number: a tensor of them would be a copy to the device, which the host waits
        # for.
        found = torch.stack([windows[..., place].eq(token) for place, token in enumerate(prefix)])
        found = found.all(0)  # (B, windows)
    else:  # the answer begins with the level: find the last position without a label
        found = labels[:, :-1].eq(IGNORED) & labels[:, 1:].ne(IGNORED)  # (B, L - 1)
    positions = found.int().argmax(1) + length  # (B,)
    # `argmax` gives 0 where nothing was found.
    is_found = found.any(1) & labels.gather(1, positions[:, None])[:, 0].ne(IGNORED)
    if not is_found.all():
        raise ValueError(
            f"{int((~is_found).sum())} of {len(labels)} rows have no level after the tokens "
            f"{list(prefix)}: check that rows are not truncated and that all answers have the "
            "recipe's form."
        )
    return positions


def to_device(index: Tensor, like: Tensor) -> Tensor:
    """An index where it is needed; the host does not wait for the copy."""
    return index.to(like.device, non_blocking=True)


def level_logits(logits: Tensor, positions: Tensor) -> Tensor:
    """The logits that predict the level of each row.

    Args:
        logits: (B, L, V).
        positions: (B,) of `level_positions`.

    Returns:
        (B, V).
    """
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, to_device(positions - 1, logits)]


def _select(values: Tensor, level_ids: Sequence[int]) -> Tensor:
    """(B, V) -> (B, K). One by one: an index of them would be a copy to the device, which the host
    waits for.
    """
    return torch.stack([values[:, number] for number in level_ids], -1)


def level_kl(logits: Tensor, level_ids: Sequence[int], targets: Tensor) -> Tensor:
    """KL(soft label || softmax over the whole vocabulary), the mean over rows.

    Args:
        logits: (B, V) of `level_logits`.
        level_ids: K token ids of the level words.
        targets: (B, K) probability of each level.
    """
    log_probs = _select(logits.float().log_softmax(-1), level_ids)  # (B, K)
    targets = targets.to(log_probs)
    return (torch.special.xlogy(targets, targets) - targets * log_probs).sum() / len(logits)


def rest_loss(logits: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Next-token loss of the answers without their levels, the mean over tokens; 0 where nothing is
    left.

    Args:
        logits: (B, L, V).
        labels: (B, L), -100 where nothing is learned. On the device of the logits or on the CPU.
        positions: (B,) of `level_positions`, where the labels are.
    """
    rest = labels.scatter(1, positions[:, None], IGNORED)[:, 1:]  # (B, L - 1)
    # Found once, because the host waits for it; for labels on the CPU it need not.
    rows, columns = rest.ne(IGNORED).nonzero(as_tuple=True)  # (T,) each
    targets = to_device(rest[rows, columns], logits)
    rows, columns = to_device(rows, logits), to_device(columns, logits)
    total = F.cross_entropy(logits[rows, columns].float(), targets, reduction="sum")
    return total / max(len(targets), 1)


def level_scores(
    logits: Tensor,
    level_ids: Sequence[int],
    values: Tensor | None = None,
    over_vocabulary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Expected value of the level and its standard deviation.

    Args:
        logits: (B, V) of `level_logits`.
        level_ids: K token ids of the level words.
        values: (K,) what each level is worth; K to 1 if not given.
        over_vocabulary: Take the softmax over all V ids, so that the probabilities of the levels
            sum to less than 1.

    Returns:
        (B,) scores and (B,) standard deviations.
    """
    logits = logits.float()
    probs = (
        _select(logits.softmax(-1), level_ids)
        if over_vocabulary
        else _select(logits, level_ids).softmax(-1)
    )  # (B, K)
    values = torch.arange(len(level_ids), 0, -1, device=probs.device) if values is None else values
    values = values.to(probs)  # (K,)
    scores = probs @ values  # (B,)
    return scores, (probs * (values - scores[:, None]) ** 2).sum(-1).sqrt()


def in_level_loss(logits: Tensor, level_ids: Sequence[int]) -> Tensor:
    """The probability of all other words where the level belongs, the mean over rows, at least
    0.01.

    Args:
        logits: (B, V) of `level_logits`.
        level_ids: K token ids of the level words.
    """
    outside = 1 - _select(logits.float().softmax(-1), level_ids).sum(-1)  # (B,)
    return outside.mean().clamp_min(_FLOOR)


def preference(first: Tensor, second: Tensor, variance: Tensor | float) -> Tensor:
    """Phi((first - second) / sqrt(variance)): how likely the first is the better one (Thurstone's
    model).

    Args:
        first, second: (B,) scores.
        variance: Of their difference, (B,) or one for all.
    """
    if not isinstance(variance, Tensor):
        # Filled on the device: a copy from the host would wait for it.
        variance = torch.full((), variance, device=first.device)
    deviation = variance.to(first.device).sqrt()
    return (1 + torch.erf((first - second) / (math.sqrt(2) * deviation))) / 2


def fidelity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - sqrt(p t) - sqrt((1 - p) (1 - t)), the mean over pairs (Tsai et al., FRank, SIGIR 2007).

    Args:
        predicted, target: (B,) probabilities.
    """
    agree = (predicted * target + _TINY).sqrt() + ((1 - predicted) * (1 - target) + _TINY).sqrt()
    return (1 - agree).mean()


def pair_loss(
    scores: tuple[Tensor, Tensor],
    mos: tuple[Tensor, Tensor],
    mos_stds: tuple[Tensor, Tensor] | None = None,
    score_stds: tuple[Tensor, Tensor] | None = None,
    detach_score_stds: bool = True,
    kind: str = "fidelity",
) -> Tensor:
    """Loss of pairs of images: the model should prefer one as much as people do.

    p = Phi((score_A - score_B) / sqrt(2)), the standard deviations of both scores being 1, or the
    given ones. t = Phi((MOS_A - MOS_B) / sqrt(std_A^2 + std_B^2)); without standard deviations of
    the opinions 1 where A is better, and 0 elsewhere.

    Args:
        scores: (B,) of A and (B,) of B, as `level_scores` gives them.
        mos, mos_stds: The opinions of both, on any scale that the two share.
        score_stds: Standard deviations of the scores in place of 1.
        detach_score_stds: No gradient goes through `score_stds`.
        kind: "fidelity", or without `mos_stds` also "bce".

    Raises:
        ValueError: If the kind is unknown, or does not fit.
    """
    if kind not in PAIR_LOSSES:
        raise ValueError(f"expected a pair loss of {' or '.join(PAIR_LOSSES)}, got {kind!r}.")
    if kind == "bce" and mos_stds is not None:
        raise ValueError(
            "the pair loss bce does not use standard deviations: leave them out, or use fidelity."
        )
    variance: Tensor | float = 2.0
    if score_stds is not None:
        variance = score_stds[0] ** 2 + score_stds[1] ** 2 + _TINY
        variance = variance.detach() if detach_score_stds else variance
    predicted = preference(scores[0], scores[1], variance)  # (B,)
    if mos_stds is not None:
        first, second = (one.to(predicted) for one in mos)
        stds = [one.to(predicted) for one in mos_stds]
        return fidelity_loss(
            predicted, preference(first, second, stds[0] ** 2 + stds[1] ** 2 + _TINY).detach()
        )
    is_better = mos[0].gt(mos[1]).to(predicted.device)  # (B,)
    if kind == "bce":
        return F.binary_cross_entropy(predicted, is_better.to(predicted))
    # Upstream: no epsilon under these roots. The branch that is chosen is never near 0.
    return (1 - torch.where(is_better, predicted, 1 - predicted).sqrt()).mean()


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of a total loss; the defaults are those of the released DeQA-Score.

    Args:
        pair: Of the pair loss.
        image: Of the losses of single images, each next-token loss plus `level` times KL.
        level: Of the KL at the level, within `image`.
        in_level: Of the probability beside the levels; 0 leaves it out.
    """

    pair: float = 1.0
    image: float = 0.05
    level: float = 1.0
    in_level: float = 0.0


def total_loss(
    pair: Tensor | float,
    next_token: Sequence[Tensor],
    kl: Sequence[Tensor],
    in_level: Sequence[Tensor] = (),
    weights: LossWeights = LossWeights(),
) -> Tensor:
    """w_pair pair + w_image sum(next token + w_level KL) + w_in_level sum(in level).

    Args:
        pair: Of `pair_loss`; 0 for single images.
        next_token, kl, in_level: Of A and of B: `rest_loss`, `level_kl` and `in_level_loss`.
    """
    total = torch.as_tensor(weights.pair * pair)
    for rest, level in zip(next_token, kl, strict=True):
        total = total + weights.image * (rest + weights.level * level)
    for outside in in_level if weights.in_level else ():
        total = total + weights.in_level * outside
    return total
