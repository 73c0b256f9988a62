"""The bars of the GPU kernels and of the engine, and a comparison of a run's results with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from _cases import COMPILED, COPY, PLAIN
from _harness import print_table

OURS, TWIN = "fastddpm cuda", "fastddpm triton"
# Names used in `Case.bars`
ON_CHIP, TWO_STAGE, BATCH_1, LARGE_STEP, SMALL_STEP = "on chip", "two-stage", "batch 1", "large step", "small step"
BATCHES = {64: "CIFAR-10 at batch 64", 256: "CIFAR-10 at batch 256"}
OPS = ("group_norm_silu", "group_norm_silu_backward", "ddpm_step_", "philox_normal", "timestep_embedding")

# Contestants of steps_per_sec.py that bars refer to: whole names, a prefix of two, and a part of one
F32, BF16, DEFAULTS = "fastddpm float32", "fastddpm bfloat16", "diffusers, as it comes"
OPENVINO, GRAPH = "OpenVINO", "CUDA graph by hand"

Value = float | tuple[float, str] | None  # the measured value, and its place; None if it was not measured


def _ms(r: dict, name: str = OURS) -> float:
    return r["contestants"][name]["ms"]


def _row(bar: str, wanted: str, value: Callable[[], Value], moonshot: bool = False) -> dict:
    """Return a bar's row. `value` raises KeyError or ValueError (nothing to choose from) if its inputs were not measured."""
    sign, bound = wanted.split()
    try:
        found = value()
    except (KeyError, ValueError):
        found = None
    measured, where = found if isinstance(found, tuple) else (found, None)
    reached = measured is not None and (measured >= float(bound) if sign == ">=" else measured <= float(bound))
    return {"bar": bar, "wanted": wanted, "measured": measured, "at": where, "reached": reached, "moonshot": moonshot}


def bars(results: Collection[dict], planned: Collection[dict]) -> list[dict]:
    """Return every bar of the ops: its bound, the measured value and its place, and whether the bar is reached.

    results: those of `kernels.measure_on_gpu`. planned: op, case and bars of every case of a whole run. A bar that lacks a
    planned case, or a contestant in it, is not measured, and so not reached.
    """
    rows, have = [], {(r["op"], r["case"]) for r in results}

    def row(bar: str, wanted: str, about: Collection[str], value: Callable[[list[dict]], Value]) -> None:
        def chosen(r: dict) -> bool:  # about: names in `Case.bars`, or ops
            return not {r["op"], *r["bars"]}.isdisjoint(about)

        whole = have >= {(p["op"], p["case"]) for p in planned if chosen(p)}
        cases = [r for r in results if whole and chosen(r)]
        rows.append(_row(bar, wanted, lambda: value(cases) if cases else None))

    def compiled(r: dict) -> float:
        """Return the time of torch.compile's best setting for this shape, in ms."""
        return min(c["ms"] for name, c in r["contestants"].items() if name.startswith(COMPILED))

    def extreme(pick: Callable, of: Callable[[dict], float]) -> Callable[[list[dict]], Value]:
        return lambda cases: pick((of(r), f"{r['op']} {r['case']}") for r in cases)

    def weighted(peer: Callable[[dict], float]) -> Callable[[list[dict]], Value]:
        return lambda cases: (
            sum(r["calls"] * peer(r) for r in cases) / sum(r["calls"] * _ms(r) for r in cases),
            f"{len(cases)} shapes, {sum(r['calls'] for r in cases)} calls",
        )

    of_copy = extreme(min, lambda r: _ms(r, COPY) / _ms(r))
    row("norm, groups on chip, of copy", ">= 0.85", [ON_CHIP], of_copy)
    row("norm, two-stage, of copy", ">= 0.60", [TWO_STAGE], of_copy)
    for batch in BATCHES.values():
        row(f"norm, {batch}, times faster than torch.compile", ">= 1.5", [batch], weighted(compiled))
        row(f"norm, {batch}, times faster than eager", ">= 1.5", [batch], weighted(lambda r: _ms(r, PLAIN)))
    than_peers = extreme(min, lambda r: min(compiled(r), _ms(r, PLAIN)) / _ms(r))
    row("norm, the network's worst shape, times faster", ">= 1.0", BATCHES.values(), than_peers)
    row("norm, batch 1, slowest node, us", "<= 4", [BATCH_1], extreme(max, lambda r: 1e3 * _ms(r)))
    row("step, [64, 3, 256, 256], of copy", ">= 0.80", [LARGE_STEP], of_copy)
    to_copy = extreme(max, lambda r: _ms(r) / _ms(r, COPY))
    row("step, [256, 3, 32, 32], times a copy", "<= 1.3", [SMALL_STEP], to_copy)
    for op in OPS:
        row(f"triton, {op}, of cuda's speed", ">= 0.75", [op], extreme(min, lambda r: _ms(r) / _ms(r, TWIN)))
    than_autograd = extreme(min, lambda r: _ms(r, PLAIN) / _ms(r))
    row("norm backward, times faster than autograd", ">= 1.3", ["group_norm_silu_backward"], than_autograd)
    return rows


def engine_bars(results: Collection[dict], kind: str) -> list[dict]:
    """Return the bars of a whole step, and the moonshots, which are optional.

    Args:
        results: Results of `steps_per_sec.measure`. Compiled peers measured separately are a result in "compiled".
        kind: "cuda"; "cpu"; or "avx2", for a CPU without wider vectors and bfloat16 products, or capped to that.
    """
    units, rows = {(r["network"], r["batch"]): r for r in results}, []

    def row(unit: tuple[str, int], what: str, wanted: str, value: Callable[[dict], Value], moonshot=False) -> None:
        bar = "{} at batch {}, ".format(*unit) + what + " (moonshot)" * moonshot
        rows.append(_row(bar, wanted, lambda: value(units[unit]), moonshot))

    def than(peer: str, ours: str = BF16) -> Callable[[dict], Value]:
        return lambda unit: (_ms(unit, peer) / _ms(unit, ours), peer)

    def than_best(unit: dict) -> Value:
        runs = {n: run for run in (unit, unit.get("compiled", {})) for n in run.get("contestants", ())}
        if not any(GRAPH in name for name in runs):  # the strongest peer: without it the best is unknown
            return None
        # Each peer is compared with ours in the same run.
        return min(than(name)(run) for name, run in runs.items() if not name.startswith("fastddpm"))

    def of_matmul(unit: dict, ours: str = BF16) -> Value:
        return unit["contestants"][ours]["share_of_matmul"]  # None if the limit itself was not measured

    def worst(bar: str, wanted: str, values: Callable[[dict], Iterable[float]]) -> None:
        found = [(v, f"{r['network']} at batch {r['batch']}") for r in results for v in values(r) if v is not None]
        rows.append(_row(bar, wanted, lambda: max(found)))

    if kind == "cuda":
        one, many, large = ("cifar10", 1), ("cifar10", 256), ("lsun256", 4)
        row(one, "bfloat16, times faster than the best peer", ">= 1.3", than_best)
        row(one, "bfloat16, times faster than the best peer", ">= 2", than_best, moonshot=True)
        row(one, "bfloat16, ms a step", "<= 0.2", lambda r: _ms(r, BF16), moonshot=True)
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
            row(unit, "float32, of matmul", f">= {share}", lambda r: of_matmul(r, F32), moonshot=True)
            row(unit, "bfloat16's step, times float32's", "<= 1.05", lambda r: _ms(r, BF16) / _ms(r, F32))
    else:
        for batch, openvino, defaults, share in ((16, 1.05, 2.2, 0.92), (1, 1.1, 3, 0.90)):
            unit = ("cifar10", batch)
            row(unit, "bfloat16, times faster than OpenVINO", f">= {openvino}", than(f"{OPENVINO} bfloat16"))
            row(unit, "bfloat16, times faster than diffusers' defaults", f">= {defaults}", than(DEFAULTS))
            row(unit, "bfloat16, of matmul", f">= {share}", of_matmul, moonshot=True)
        row(("cifar10", 16), "float32, times faster than OpenVINO", ">= 1.1", than(f"{OPENVINO} float32", F32))
    if kind != "cuda":
        worst("a warm call's own time, ms a step", "<= 1", lambda r: [r["own_ms"]])
    worst("a cold call's first step, s", "<= 5" if kind == "cuda" else "<= 1", lambda r: r.get("cold_s", {}).values())
    ours = lambda r: [c["added_of_weights"] for name, c in r["contestants"].items() if name in (F32, BF16)]  # noqa: E731
    worst("memory that the engine adds, times the weights", "<= 1.2", ours)
    return rows


def print_bars(rows: Iterable[dict]) -> None:
    said = [("not measured" if r["measured"] is None else f"{r['measured']:.3g}", r) for r in rows]
    cells = [[r["bar"], r["wanted"], found, "yes" if r["reached"] else "NO", r["at"] or ""] for found, r in said]
    print_table(["bar", "wanted", "measured", "reached", "where"], cells)


def missed(rows: Iterable[dict], excused: Iterable[str] = ()) -> list[str]:
    """Return the required bars that are missed. A bar with a word of `excused` in it need not have been measured."""
    rows = [r for r in rows if r["measured"] is not None or not any(word in r["bar"] for word in excused)]
    return [r["bar"] for r in rows if not r["reached"] and not r["moonshot"]]
