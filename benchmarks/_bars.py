"""What the GPU kernels have to reach, and what a run's results say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from _cases import COMPILED, COPY, PLAIN

OURS, TWIN = "fastddpm cuda", "fastddpm triton"
# Names that cases have in `Case.bars`
ON_CHIP, TWO_STAGE, BATCH_1, LARGE_STEP, SMALL_STEP = "on chip", "two-stage", "batch 1", "large step", "small step"
BATCHES = (64, 256)
OPS = ("group_norm_silu", "group_norm_silu_backward", "ddpm_step_", "philox_normal", "timestep_embedding")


def network(batch: int) -> str:
    return f"CIFAR-10 at batch {batch}"


def _ms(result: dict, name: str) -> float:
    """The median; a KeyError where the contestant was left out or could not be captured."""
    contestant = result["contestants"][name]
    if "not_captured" in contestant:
        raise KeyError(name)
    return contestant["ms"]


def _compiled_ms(result: dict) -> float:
    """Of torch.compile's best setting for this shape."""
    settings = result["contestants"].items()
    found = [c["ms"] for name, c in settings if name.startswith(COMPILED) and "not_captured" not in c]
    if not found:
        raise KeyError(COMPILED)
    return min(found)


def _plain_ms(result: dict) -> float:
    return _ms(result, PLAIN)


def bars(results: Sequence[dict], planned: Sequence[dict]) -> list[dict]:
    """Every bar: what was wanted, what was measured and where, and whether that reaches it.

    results: as `kernels.summary` makes them. planned: op, case and bars of every case that a whole run has; a bar
    that lacks a planned case, or a contestant in it, is not measured, and so not reached.
    """
    rows = []

    def missing(chosen: Callable[[dict], bool]) -> bool:
        have = {(r["op"], r["case"]) for r in results}
        return any((p["op"], p["case"]) not in have for p in planned if chosen(p))

    def row(bar: str, wanted: str, chosen: Callable[[dict], bool], value: Callable[[list[dict]], tuple[float, str]]):
        cases = [r for r in results if chosen(r)]
        at_least, bound = wanted.split()[0] == ">=", float(wanted.split()[1])
        try:
            if missing(chosen) or not cases:
                raise KeyError(bar)
            measured, where = value(cases)
            reached = measured >= bound if at_least else measured <= bound
        except KeyError:
            measured, where, reached = None, None, False
        rows.append({"bar": bar, "wanted": wanted, "measured": measured, "at": where, "reached": reached})

    def extreme(pick: Callable, of: Callable[[dict], float]) -> Callable[[list[dict]], tuple[float, str]]:
        return lambda cases: pick((of(r), f"{r['op']} {r['case']}") for r in cases)

    def weighted(peer: Callable[[dict], float]) -> Callable[[list[dict]], tuple[float, str]]:
        def of(cases: list[dict]) -> tuple[float, str]:
            total = sum(r["calls"] * peer(r) for r in cases) / sum(r["calls"] * _ms(r, OURS) for r in cases)
            return total, f"{len(cases)} shapes, {sum(r['calls'] for r in cases)} calls"

        return of

    def has(bar: str) -> Callable[[dict], bool]:
        return lambda r: bar in r["bars"]

    def of_copy(r: dict) -> float:
        return _ms(r, COPY) / _ms(r, OURS)

    row("norm, groups on chip, of copy", ">= 0.85", has(ON_CHIP), extreme(min, of_copy))
    row("norm, two-stage, of copy", ">= 0.60", has(TWO_STAGE), extreme(min, of_copy))
    for batch in BATCHES:
        for name, peer in (("torch.compile", _compiled_ms), ("eager", _plain_ms)):
            row(f"norm, {network(batch)}, times faster than {name}", ">= 1.5", has(network(batch)), weighted(peer))
    row(
        "norm, the network's worst shape, times faster",
        ">= 1.0",
        lambda r: any(network(batch) in r["bars"] for batch in BATCHES),
        extreme(min, lambda r: min(_compiled_ms(r), _plain_ms(r)) / _ms(r, OURS)),
    )
    row("norm, batch 1, slowest node, us", "<= 4", has(BATCH_1), extreme(max, lambda r: 1e3 * _ms(r, OURS)))
    row("step, [64, 3, 256, 256], of copy", ">= 0.80", has(LARGE_STEP), extreme(min, of_copy))
    row("step, [256, 3, 32, 32], times a copy", "<= 1.3", has(SMALL_STEP), extreme(max, lambda r: 1 / of_copy(r)))
    for op in OPS:
        row(
            f"triton, {op}, of cuda's speed",
            ">= 0.75",
            lambda r, op=op: r["op"] == op,
            extreme(min, lambda r: _ms(r, OURS) / _ms(r, TWIN)),
        )
    row(
        "norm backward, times faster than autograd",
        ">= 1.3",
        lambda r: r["op"] == "group_norm_silu_backward",
        extreme(min, lambda r: _plain_ms(r) / _ms(r, OURS)),
    )
    return rows


def cells(rows: Iterable[dict]) -> list[list[str]]:
    """For a table: bar | wanted | measured | reached | where."""
    return [
        [
            r["bar"],
            r["wanted"],
            "not measured" if r["measured"] is None else f"{r['measured']:.3g}",
            "yes" if r["reached"] else "NO",
            r["at"] or "",
        ]
        for r in rows
    ]
