"""What the GPU kernels and the engine have to reach, and what a run's results say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from _cases import COMPILED, COPY, PLAIN

OURS, TWIN = "fastddpm cuda", "fastddpm triton"
# Names that cases have in `Case.bars`
ON_CHIP, TWO_STAGE, BATCH_1, LARGE_STEP, SMALL_STEP = "on chip", "two-stage", "batch 1", "large step", "small step"
BATCHES = (64, 256)
OPS = ("group_norm_silu", "group_norm_silu_backward", "ddpm_step_", "philox_normal", "timestep_embedding")

# Contestants of steps_per_sec.py that bars refer to: whole names, the start of two, and a part of one
F32, BF16, DEFAULTS = "fastddpm float32", "fastddpm bfloat16", "diffusers, as it comes"
OPENVINO, GRAPH = "OpenVINO", "CUDA graph by hand"


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


def _row(bar: str, wanted: str, value: Callable[[], tuple[float, str | None]]) -> dict:
    """value: (what was measured, where), or a KeyError where something that it needs was not."""
    at_least, bound = wanted.split()[0] == ">=", float(wanted.split()[1])
    try:
        measured, where = value()
        reached = measured >= bound if at_least else measured <= bound
    except KeyError:
        measured, where, reached = None, None, False
    return {"bar": bar, "wanted": wanted, "measured": measured, "at": where, "reached": reached}


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
        def measured() -> tuple[float, str]:
            cases = [r for r in results if chosen(r)]
            if missing(chosen) or not cases:
                raise KeyError(bar)
            return value(cases)

        rows.append(_row(bar, wanted, measured))

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


def engine_bars(results: Sequence[dict], kind: str) -> list[dict]:
    """The bars of a whole step, and the moonshots, which nobody has to reach.

    results: as `steps_per_sec.measure` makes them. kind: "cuda"; "cpu"; or "avx2", for a CPU that has no wider vectors
    and no bfloat16 products, or is capped to that.
    """
    units = {(r["network"], r["batch"]): r for r in results}
    rows = []

    def row(
        unit: tuple[str, int], what: str, wanted: str, value: Callable[[dict], tuple[float, str | None]], moonshot=False
    ) -> None:
        bar = "{} at batch {}, ".format(*unit) + what + " (moonshot)" * moonshot
        rows.append({**_row(bar, wanted, lambda: value(units[unit]["contestants"])), "moonshot": moonshot})

    def than(peer: str, ours: str = BF16) -> Callable[[dict], tuple[float, str]]:
        return lambda contestants: (contestants[peer]["ms"] / contestants[ours]["ms"], peer)

    def than_best(contestants: dict) -> tuple[float, str]:
        if not any(GRAPH in name for name in contestants):  # the strongest, without which there is no best
            raise KeyError(GRAPH)
        peers = [name for name in contestants if not name.startswith("fastddpm")]
        return than(min(peers, key=lambda name: contestants[name]["ms"]))(contestants)

    def of_matmul(contestants: dict, ours: str = BF16) -> tuple[float, None]:
        share = contestants[ours]["share_of_matmul"]
        if share is None:  # the limit itself was not measured
            raise KeyError(ours)
        return share, None

    def ms(contestants: dict) -> tuple[float, None]:
        return contestants[BF16]["ms"], None

    def worst(bar: str, wanted: str, values: Callable[[dict], Iterable[float]]) -> None:
        """Of all that was measured."""

        def value() -> tuple[float, str]:
            found = [(v, f"{r['network']} at batch {r['batch']}") for r in results for v in values(r) if v is not None]
            if not found:
                raise KeyError(bar)
            return max(found)

        rows.append({**_row(bar, wanted, value), "moonshot": False})

    if kind == "cuda":
        one, many, large = ("cifar10", 1), ("cifar10", 256), ("lsun256", 4)
        row(one, "bfloat16, times faster than the best peer", ">= 1.3", than_best)
        row(one, "bfloat16, times faster than the best peer", ">= 2", than_best, moonshot=True)
        row(one, "bfloat16, ms a step", "<= 0.2", ms, moonshot=True)
        row(many, "bfloat16, times faster than the best peer", ">= 1.15", than_best)
        row(many, "bfloat16, of matmul", ">= 0.65", of_matmul, moonshot=True)
        row(large, "bfloat16, times faster than the best peer", ">= 1.12", than_best)
        row(large, "bfloat16, of matmul", ">= 0.65", of_matmul, moonshot=True)
        row(one, "bfloat16, times faster than diffusers' defaults", ">= 10", than(DEFAULTS))
        row(many, "bfloat16, times faster than diffusers' defaults", ">= 4", than(DEFAULTS))
    elif kind == "avx2":
        for batch, openvino, share in ((16, 1.4, 1.30), (1, 1.15, 0.90)):
            unit = ("cifar10", batch)
            row(unit, "float32, times faster than OpenVINO", f">= {openvino}", than(f"{OPENVINO} float32", F32))
            row(unit, "float32, times faster than diffusers' defaults", ">= 1.7", than(DEFAULTS, F32))
            row(unit, "float32, of matmul", f">= {share}", lambda c: of_matmul(c, F32), moonshot=True)
            row(unit, "bfloat16's step, times float32's", "<= 1.05", lambda c: (c[BF16]["ms"] / c[F32]["ms"], None))
    else:
        for batch, openvino, defaults, share in ((16, 1.05, 2.2, 0.92), (1, 1.1, 3, 0.90)):
            unit = ("cifar10", batch)
            row(unit, "bfloat16, times faster than OpenVINO", f">= {openvino}", than(f"{OPENVINO} bfloat16"))
            row(unit, "bfloat16, times faster than diffusers' defaults", f">= {defaults}", than(DEFAULTS))
            row(unit, "bfloat16, of matmul", f">= {share}", of_matmul, moonshot=True)
        row(("cifar10", 16), "float32, times faster than OpenVINO", ">= 1.1", than(f"{OPENVINO} float32", F32))
    if kind != "cuda":
        worst("a warm call's own time, ms a step", "<= 1", lambda r: [r["own_ms"]])
    worst("a cold call's first step, s", "<= 5" if kind == "cuda" else "<= 1", lambda r: r["cold_s"].values())
    worst(
        "memory that the engine adds, times the weights",
        "<= 1.2",
        lambda r: [c["added_of_weights"] for name, c in r["contestants"].items() if name in (F32, BF16)],
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
