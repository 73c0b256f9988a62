"""Seeds and streams of the counter-based random numbers of ops/philox_normal.py."""

from __future__ import annotations

import enum

import torch

from ..utils.validation import check_int


def random_seed(generator: torch.Generator = torch.default_generator) -> int:
    """Return 64 random bits from a generator. torch.manual_seed determines those of the default generator."""
    high, low = torch.randint(0, 1 << 32, (2,), generator=generator, device=generator.device).tolist()
    return high << 32 | low


def seed_of(seed: int | torch.Generator | None) -> int:
    """Return a seed in [0, 2^64): `seed` itself, 64 bits drawn from a generator, or a random seed for None."""
    if seed is None:
        return random_seed()
    if isinstance(seed, torch.Generator):
        return random_seed(seed)
    return check_seed(seed)


UINT64 = 1 << 64


def as_int64_bits(seed: int) -> int:
    """Return the int64 with the bits of a seed in [0, 2^64): op schemas have no uint64."""
    return seed - UINT64 if seed >= UINT64 // 2 else seed


def check_seed(seed: object, name: str = "seed") -> int:
    return check_int(name, seed, 0, UINT64, "an int in [0, 2^64)")


def check_first(first: object, name: str = "first") -> int:
    return check_int(name, first, 0, 1 << 56, "an int in [0, 2^56)")


class Stream(enum.IntEnum):
    """The purpose of a random draw. Draws of different streams never share a counter.

    Attributes:
        X_T: The noise x_T that a chain starts from; t is 0.
        REVERSE: The noise z of a reverse step.
        FORWARD: The noise of q(x_t | x_0).
        TIMESTEP: A training timestep, (w0 * T) >> 32 for the first random word w0.
        FLIP: Whether a training image is flipped.
        DROPOUT: The seed of a training step's dropout.
    """

    X_T = 0
    REVERSE = 1
    FORWARD = 2
    TIMESTEP = 3
    FLIP = 4
    DROPOUT = 5
