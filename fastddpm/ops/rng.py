"""Seeds and streams of the counter-based random numbers (see ops/philox_normal.py)."""

from __future__ import annotations

import enum

import torch

from ..utils.validation import check_int


def random_seed() -> int:
    """64 bits from torch's default CPU generator, so that torch.manual_seed governs them."""
    high, low = torch.randint(0, 1 << 32, (2,)).tolist()
    return high << 32 | low


def seed_of(seed: int | torch.Generator | None) -> int:
    if seed is None:
        return random_seed()
    if isinstance(seed, torch.Generator):
        high, low = torch.randint(0, 1 << 32, (2,), generator=seed, device=seed.device).tolist()
        return high << 32 | low
    return check_seed(seed)


UINT64 = 1 << 64


def as_int64_bits(seed: int) -> int:
    """A seed in [0, 2^64) as the int64 with the same bits, as it crosses op schemas."""
    return seed - UINT64 if seed >= UINT64 // 2 else seed


def check_seed(seed: object, name: str = "seed") -> int:
    return check_int(name, seed, 0, UINT64, "an int in [0, 2^64)")


def check_first(first: object, name: str = "first") -> int:
    return check_int(name, first, 0, 1 << 56, "an int in [0, 2^56)")


class Stream(enum.IntEnum):
    """What a draw is for; streams never share a counter."""

    X_T = 0  # the chain's start, t = 0
    REVERSE = 1  # a reverse step's z
    FORWARD = 2  # q(x_t | x_0)
    TIMESTEP = 3  # training timestep, t = (w0 T) >> 32
    FLIP = 4
    DROPOUT = 5
