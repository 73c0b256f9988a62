"""Shared code of the benchmarks: alternating timing, the machine's description, the load on it, tables and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

import fastddpm
from fastddpm.utils.files import atomic_write

BUSY = 0.3  # cores used by other processes, above which a machine is not idle

# ------------------------------------------------------------------------------------------------ timing


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, one entry for each round."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        """Return a quantile, linear between the two nearest rounds."""
        ordered = sorted(self.seconds)
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def milliseconds(self) -> dict[str, float]:
        return {
            "ms": 1e3 * self.median,
            "ms_p20": 1e3 * self.quantile(0.2),
            "ms_p80": 1e3 * self.quantile(0.8),
            "rounds": len(self.seconds),
        }


def _clock(call: Callable[[], object], times: int, self_timed: bool = False) -> float:
    """Return the seconds of one call; a self-timed call returns them itself."""
    start, said = time.perf_counter(), 0.0
    for _ in range(times):
        result = call()
        if self_timed:
            said += result
    return (said if self_timed else time.perf_counter() - start) / times


def alternate(
    contestants: dict[str, Callable[[], object]],
    *,
    self_timed: Collection[str] = (),
    rounds: int | None = None,
    seconds: float = 2.0,
    least: float = 2e-3,
    label: str = "",
) -> dict[str, Timing]:
    """Time every contestant once in each round, in turn, so that any drift of the machine affects all of them.

    Each round starts with another contestant, so that none is always first. A turn repeats a short call until it lasts
    `least` seconds.

    Args:
        rounds: Number of rounds. Default: as many as fit into `seconds`, from 5 to 100.
        self_timed: Contestants whose calls return the seconds of the part that counts.
    """
    repeats, one = {}, 0.0  # one: seconds of a round
    for name, call in contestants.items():
        call()  # caches, allocators and lazy initialisation
        once = _clock(call, 1)
        repeats[name] = max(1, math.ceil(least / once))
        one += repeats[name] * once
    if rounds is None:
        rounds = max(5, min(100, int(seconds / one)))
    taken = {name: [] for name in contestants}
    for name in turns(contestants, rounds, label):
        taken[name].append(_clock(contestants[name], repeats[name], name in self_timed))
    return {name: Timing(values) for name, values in taken.items()}


def turns(names: Collection[str], rounds: int, label: str) -> Iterator[str]:
    """Yield every contestant once in each round; each round starts with another one."""
    for r in tqdm(range(rounds), desc=label, unit="round", leave=False, disable=None):
        yield from in_round(names, r)


def in_round(names: Collection[str], r: int) -> list[str]:
    """Return the order of round r, which starts with another contestant than the round before."""
    names, first = list(names), r % len(names)
    return names[first:] + names[:first]


class Rotation:
    """Endless turns through `sets`: the next call of any contestant gets the set that was used longest ago.

    With more bytes in the sets than the caches hold, no contestant reads from a cache.
    """

    def __init__(self, make: Callable[[], Sequence[torch.Tensor]], total_bytes: int) -> None:
        self.sets = [make()]
        size = sum(v.numel() * v.element_size() for v in self.sets[0])
        self.sets += [make() for _ in range(math.ceil(total_bytes / size) - 1)]
        self.turn = -1

    def next(self) -> Sequence[torch.Tensor]:
        self.turn = (self.turn + 1) % len(self.sets)
        return self.sets[self.turn]


# -------------------------------------------------------------------------------------------------- clock


class Clock:
    """The time limit of a run."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """Print the elapsed time, the time limit and a line, without buffering, so that a file receives it at once."""
        passed, all_of_it = (f"{s // 60:2}:{s % 60:02}" for s in (int(self.seconds - self.left()), int(self.seconds)))
        print(f"[{passed} of {all_of_it.strip()}] {text}", flush=True)


# --------------------------------------------------------------------------------------------------- load


def _cpu_seconds() -> tuple[float, float] | None:
    """Return (all cores' busy seconds since boot, this process's own), or None if the system does not report them."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(v) for v in fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy, times.user + times.system + times.children_user + times.children_system


class Load:
    """Number of cores that other processes use: measured for two seconds before the run, and then over the run.

    The 1-minute load average would also count a benchmark that ended half a minute ago, so it is used only if /proc/stat
    is missing. Time that a hypervisor gave to other machines counts as other processes'.
    """

    def __init__(self, force: bool) -> None:
        self.before = self._others(_cpu_seconds(), time.perf_counter(), sleep=2.0)
        self.average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.forced = False
        seen = self.average if self.before is None else self.before
        if seen is not None and seen > BUSY:
            _busy(f"other processes use {seen:.1f} of {os.cpu_count()} cores (load average {self.average:.1f})", force)
            self.forced = True
        self._start, self._clock = _cpu_seconds(), time.perf_counter()

    @staticmethod
    def _others(start: tuple[float, float] | None, clock: float, sleep: float = 0.0) -> float | None:
        if start is None:
            return None
        time.sleep(sleep)
        busy, own = (now - then for now, then in zip(_cpu_seconds(), start, strict=True))
        return max(0.0, (busy - own) / (time.perf_counter() - clock))

    def report(self) -> dict[str, object]:
        during = self._others(self._start, self._clock)
        if during is not None and during > BUSY:
            print(f"warning: during the run other processes used {during:.1f} cores on average", file=sys.stderr)
        return {
            "others_cores_before": self.before,
            "others_cores_during": during,
            "load_average_before": self.average,
            "forced_on_a_busy_machine": self.forced,
        }


def refuse_if_used(force: bool) -> None:
    """Exit if other processes hold memory of this GPU, since they may then compute on it too."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if others > 2 << 30:  # a context and its modules take several hundred MiB
        _busy(f"other processes hold {others / 2**30:.1f} GiB of this GPU's memory", force)


def _busy(message: str, force: bool) -> None:
    if not force:
        print(f"{message}: timings would mean little. Wait for them to end, or pass --force.", file=sys.stderr)
        sys.exit(2)  # no result is wrong, and nothing was run
    print(f"warning: {message}; continuing because of --force", file=sys.stderr)


# ----------------------------------------------------------------------------------------- provenance


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines[: lines.index("")])
        # Several generations share a name such as "AMD EPYC".
        return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "fastddpm_cpu_variant": fastddpm.backend.describe()["cpu_variant"],
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    others = ("torch", "diffusers", "openvino", "numpy")
    return {"fastddpm": fastddpm.__version__, **{name: version(name) for name in others}}


def commit() -> str | None:
    """Return the commit of this file's checkout, with a + if tracked files other than results differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(settings: argparse.Namespace) -> dict[str, object]:
    # Results are published: paths on the user's machine are left out.
    given = {
        name: Path(value).name if isinstance(value, (str, Path)) else value
        for name, value in vars(settings).items()
        if name not in ("json", "plot")
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "settings": given,
    }


# ------------------------------------------------------------------------------------- arguments and output


def arguments(description: str, *, timed: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write figures, machine and settings here")
    if timed:
        parser.add_argument("--plot", type=Path, metavar="PATH", help="draw a chart (needs matplotlib)")
        parser.add_argument("--force", action="store_true", help="measure although other processes are busy")
    return parser


def check_outputs(settings: argparse.Namespace) -> None:
    """Exit before the measurement if a result could not be written."""
    for option in ("json", "plot"):
        path = getattr(settings, option, None)
        if path is not None and not path.parent.is_dir():
            sys.exit(f"--{option}: the folder {path.parent} does not exist")
    if getattr(settings, "plot", None) is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit("--plot: needs matplotlib (pip install matplotlib)")


def check_inputs(settings: argparse.Namespace) -> None:
    """Exit if the data is missing. Create the cache's folder if one is given."""
    if not settings.data.is_file():
        sys.exit(f"--data: {settings.data}: no such file")
    if hasattr(settings, "cache"):
        settings.cache.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: dict[str, object], *, quiet: bool = False) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    if not quiet:
        print(f"wrote {path}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns of minimal width, numbers to the right. A row of one cell is a heading with a line above it."""
    full = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in [header, *full]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        if len(row) == 1:
            print(f"\n{row[0]}")
            continue
        name, *numbers = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([name, *numbers]).rstrip())


def bar_chart(path: Path, title: str, unit: str, panels: dict[str, dict[str, float]]) -> None:
    """Draw one panel of horizontal bars for each entry of `panels`: name -> value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(len(bars) for bars in panels.values())
    figure, axes = plt.subplots(lines, columns, figsize=(6.5 * columns, lines * (0.8 + 0.35 * tallest)), squeeze=False)
    for axis, (name, bars) in zip(axes.flat, panels.items(), strict=False):
        colours = ["tab:blue" if label.startswith("fastddpm") else "tab:gray" for label in bars]
        drawn = axis.barh(list(bars), list(bars.values()), color=colours)
        axis.bar_label(drawn, fmt="%.4g", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(unit)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")
