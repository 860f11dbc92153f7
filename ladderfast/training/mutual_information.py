"""Adjusted mutual information of many pairs of groupings at once."""

from __future__ import annotations

import torch
from torch import Tensor

NORMALISERS = ("arithmetic", "max")
MANY = 64  # labels from here on are renumbered, as there is a place for each in a table
TERMS = 1 << 22  # of the expectation computed at a time, 8 bytes each and some ten such arrays


def adjusted_mutual_information(
    truth: Tensor, predicted: Tensor, *, normaliser: str = "arithmetic"
) -> Tensor:
    """AMI of each image's two groupings of its pixels, (N,), float64, on the CPU.

        AMI = (MI - E[MI]) / (norm(H(truth), H(predicted)) - E[MI])

    with the expectation over all groupings of the same sizes. 1 where they agree, 0 for chance.

    Args:
        truth: (N, P) integers, the owner of each pixel; pixels of owner 0 are left out.
        predicted: (N, P) integers from 0 on, the group of each pixel.
        normaliser: norm of the two entropies, "arithmetic" (mean) or "max". scikit-learn's default is the former today
            and was the latter up to 0.21.

    Groupings without a pixel, or with one group each, agree.

    Raises TypeError for what is no tensor of integers, ValueError for shapes that differ, negative entries or another
    normaliser.

    Source: Vinh, Epps and Bailey, "Information Theoretic Measures for Clusterings Comparison", 2010, equation 24a.
    """
    for name, t in (("truth", truth), ("predicted", predicted)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if truth.dim() != 2 or truth.shape != predicted.shape:
        raise ValueError(
            f"truth and predicted must have one shape (N, P), got {tuple(truth.shape)} and {tuple(predicted.shape)}"
        )
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {', '.join(NORMALISERS)}, got {normaliser!r}")
    truth, predicted = truth.cpu().long(), predicted.cpu().long()
    if truth.numel() and min(int(truth.min()), int(predicted.min())) < 0:
        raise ValueError("truth and predicted must not be negative")
    table = _contingency(truth, predicted)
    size, a, b = table.sum((1, 2)), table.sum(2), table.sum(1)
    n = size.clamp(min=1).double()
    joint = table / n[:, None, None]
    p, q = a / n[:, None], b / n[:, None]
    information = (torch.xlogy(joint, joint) - joint * _log(p)[:, :, None] - joint * _log(q)[:, None, :]).sum(
        (1, 2)
    )
    h_a, h_b = (-torch.xlogy(t, t).sum(1) for t in (p, q))
    norm = (h_a + h_b) / 2 if normaliser == "arithmetic" else torch.maximum(h_a, h_b)
    expected = _expected(size, a, b)
    # Groupings that agree but for their numbers: the quotient would be 1, or of two zeros.
    filled = table > 0
    same = ((filled.sum(1) <= 1).all(1)) & (filled.sum(2) <= 1).all(1)
    return ((information - expected) / (norm - expected)).masked_fill(same, 1.0)


def _log(p: Tensor) -> Tensor:
    return torch.where(p > 0, p, 1.0).log()


def _contingency(truth: Tensor, predicted: Tensor) -> Tensor:
    """Pixels of each owner from 1 on in each group, (N, owners, groups)."""
    images = len(truth)
    if not truth.numel():
        return truth.new_zeros(images, 1, 1)
    truth, predicted = (_renumbered(t) if int(t.max()) >= MANY else t for t in (truth, predicted))
    owners, groups = int(truth.max()) + 1, int(predicted.max()) + 1
    place = (torch.arange(images)[:, None] * owners + truth) * groups + predicted
    counts = torch.bincount(place.reshape(-1), minlength=images * owners * groups)
    return counts.reshape(images, owners, groups)[:, 1:]


def _renumbered(labels: Tensor) -> Tensor:
    """Each image's labels (N, P) without gaps, in their order: 0 stays 0, and the others are from 1 on."""
    ordered, place = labels.sort(1)
    new = ordered.diff(dim=1, prepend=labels.new_zeros(len(labels), 1)) > 0
    return torch.empty_like(labels).scatter_(1, place, new.cumsum(1))


def _expected(size: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[MI] of each image, (N,): a sum over owners, groups and the pixels that they may share.

    What an owner of a pixels and a group of b contribute depends on (size, a, b) alone, and is computed once for each
    such triple, hypergeometrically.
    """
    images, owners, groups = len(size), a.shape[1], b.shape[1]
    triples = torch.stack(
        [
            size[:, None, None].expand(images, owners, groups),
            a[:, :, None].expand(images, owners, groups),
            b[:, None, :].expand(images, owners, groups),
        ],
        -1,
    ).reshape(-1, 3)
    limit = int(size.max()) + 1 if images else 1
    # One number a triple: sorting these is several times as fast as sorting rows.
    codes, where = ((triples[:, 0] * limit + triples[:, 1]) * limit + triples[:, 2]).unique(
        return_inverse=True
    )
    n, a, b = codes // limit**2, codes // limit % limit, codes % limit
    first, last = (a + b - n).clamp(min=1), torch.minimum(a, b)
    terms = (last - first + 1).clamp(min=0)
    log_factorial = torch.lgamma(torch.arange(1, limit + 2, dtype=torch.float64))
    values = torch.zeros(len(codes), dtype=torch.float64)
    ends = terms.cumsum(0)
    start = 0
    while start < len(codes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + TERMS, right=True)))
        part = slice(start, stop)
        row = torch.repeat_interleave(torch.arange(stop - start), terms[part])
        offset = torch.arange(len(row)) - (ends[part] - terms[part] - before)[row]
        k = first[part][row] + offset
        fixed = (
            log_factorial[a[part]]
            + log_factorial[b[part]]
            + log_factorial[(n - a)[part]]
            + log_factorial[(n - b)[part]]
            - log_factorial[n[part]]
        )
        log_p = fixed[row] - log_factorial[k] - log_factorial[a[part][row] - k]
        log_p -= log_factorial[b[part][row] - k] + log_factorial[(n - a - b)[part][row] + k]
        ratio = (n[part].double() / (a[part] * b[part]).double())[row] * k
        term = k / n[part].double()[row] * ratio.log() * log_p.exp()
        values[part].index_add_(0, row, term)
        start = stop
    return values[where].reshape(images, owners * groups).sum(1)
