"""Distances between sets of features: Frechet and kernel distance, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

SUBSETS, SUBSET_SIZE = 100, 1000  # defaults of the kernel distance


class Statistics(NamedTuple):
    count: int
    mean: torch.Tensor  # float64 [D]
    covariance: torch.Tensor  # float64 [D, D], divided by count - 1


def statistics(batches: Iterable[torch.Tensor]) -> Statistics:
    """Return the mean and covariance of batches of features [N, D], in float64.

    Each batch is centred on its own mean and then merged (Chan, Golub & LeVeque 1983), so no squared mean is
    subtracted. Another split into batches changes only rounding.
    """
    count, mean, scatter = 0, 0.0, 0.0
    for batch in batches:
        if not len(batch):
            continue
        batch = batch.double()
        batch_mean = batch.mean(0)
        centred, shift = batch - batch_mean, batch_mean - mean
        total = count + len(batch)
        scatter = scatter + centred.T @ centred + shift.outer(shift) * (count * len(batch) / total)
        mean = mean + shift * (len(batch) / total)
        count = total
    if count < 2:
        raise ValueError(f"statistics: got {count} images; a covariance needs at least 2")
    return Statistics(count, mean, scatter / (count - 1))


def frechet(p: Statistics, q: Statistics) -> float:
    """Return the Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 (Heusel et al. 2017).

    S1 S2 has the same eigenvalues as R S2 R with R = S1^(1/2). That matrix is symmetric, so no complex square root is
    needed.
    """
    (_, m1, s1), (_, m2, s2) = p, q
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def kernel_distance(
    p: torch.Tensor, q: torch.Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Return (mean, standard deviation) over subsets of the unbiased MMD^2, in float64 (Binkowski et al. 2018).

    The kernel is (x.y / D + 1)^3. Each subset has min(size, N, M) features of each set, drawn without replacement.

    Args:
        p: features [N, D].
        q: features [M, D].
        subsets: number of subsets.
        size: number of features in a subset.
        seed: seed of the subsets.
    """
    size = min(size, len(p), len(q))
    if size < 2:
        raise ValueError(f"kernel distance: got {len(p)} and {len(q)} images; expected at least 2 of each")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        x, y = (v[torch.randperm(len(v), generator=generator)[:size]].double() for v in (p, q))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        distances.append(within / (size * (size - 1)) - 2 * xy.mean())
    distances = torch.stack(distances)
    return float(distances.mean()), float(distances.std(correction=0))
