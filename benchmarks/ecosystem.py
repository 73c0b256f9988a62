"""What diffusers users gain, and what reading a checkpoint costs.

    python benchmarks/ecosystem.py --json benchmarks/results/ecosystem.json

Each case is compared with the code that it replaces. The cases and their bars:
  - load: `UNet.from_pretrained` of the paper's CIFAR-10 network (143 MB) from a fastddpm folder and from a diffusers folder, at
    most 1.2 times as long as safetensors takes for the tensors. Its load_file maps the file and reads nothing, so the timing
    includes a copy of each tensor, as in a network that does not depend on the file. The bar is for the first load in a
    process, with the file in the system's cache; "again" are the loads after it, into memory that the previous one freed.
  - scheduler: a step of FusedDDPMScheduler and FusedDDIMScheduler at [256, 3, 32, 32], float32. DDPM with torch's noise at least
    1.4 times as fast as diffusers' own, with a noise_seed at least 4 times.
  - norms: a forward of diffusers' UNet2DModel, the CIFAR-10 network in float32, after `fuse_norms`: at batch 16 at least
    1.05 times as fast as before.
  - sample: `sample` with a live UNet2DModel as fast as with a `UNet` of the same weights: at least 0.97 of its speed.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _contestants import diffusers_unet, the_network
from _harness import (
    Load,
    Rotation,
    Timing,
    alternate,
    arguments,
    check_outputs,
    print_table,
    provenance,
    turns,
    write_json,
)  # fmt: skip
from diffusers import DDIMScheduler, DDPMScheduler

import fastddpm
from fastddpm import Schedule, UNet, fuse_norms, ops
from fastddpm.integrations.diffusers import FusedDDIMScheduler, FusedDDPMScheduler
from fastddpm.ops.rng import Stream

SHAPE = (256, 3, 32, 32)
CACHES = 256 << 20  # bytes of inputs used in turn, more than a CPU's caches hold
STEPS = 10
# (contestant, peer, case): lower bound of the peer's time over the contestant's
BARS = {
    ("fastddpm folder", "safetensors", "load"): 1 / 1.2,
    ("diffusers folder", "safetensors", "load"): 1 / 1.2,
    ("FusedDDPMScheduler", "DDPMScheduler", "scheduler"): 1.4,
    ("FusedDDPMScheduler, noise_seed", "DDPMScheduler", "scheduler"): 4.0,
    ("batch 16, fused", "batch 16", "norms"): 1.05,
    ("UNet2DModel", "UNet", "sample"): 0.97,
}


def agree(case: str, got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Exit if a contestant's output is wrong, so that it is not timed."""
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not error <= bound:
        sys.exit(f"{case}: differs by {error:.2g}, more than {bound:.2g}; not timed")


LOADS = """
import statistics, time, torch
{0}
taken = []
for _ in range(10):
    held = None
    start = time.perf_counter()
    held = {1}
    taken.append(time.perf_counter() - start)
print(taken[0], statistics.median(taken[1:]))
"""


def load(model: UNet, rounds: int | None) -> dict[str, Timing]:
    """Time each load in a new process, as in practice: with fresh memory and code that has not run before."""
    with tempfile.TemporaryDirectory() as folder:
        own, theirs = Path(folder, "own-ema"), Path(folder, "theirs-ema")
        model.save_pretrained(own)
        model.save_pretrained(theirs, format="diffusers")
        for path in (own, theirs):
            state = UNet.from_pretrained(path).state_dict()
            for name, value in model.state_dict().items():
                agree(f"load: {name}", state[name], value, 0)
        # An installed package's modules are compiled.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "DIFFUSERS_VERBOSITY": "error"}
        copies = f"{{k: v.clone() for k, v in safetensors.torch.load_file({str(own / 'model.safetensors')!r}).items()}}"
        contestants = {
            "safetensors": ("import safetensors.torch", copies),
            "fastddpm folder": ("from fastddpm import UNet", f"UNet.from_pretrained({str(own)!r})"),
            "diffusers folder": ("from fastddpm import UNet", f"UNet.from_pretrained({str(theirs)!r})"),
            "diffusers' own": (
                "from diffusers import UNet2DModel",
                f"UNet2DModel.from_pretrained({str(theirs)!r}, subfolder='unet')",
            ),
        }

        taken = {kind: [] for name in contestants for kind in (name, f"{name}, again")}
        for name in turns(contestants, rounds or 10, "load"):
            command = [sys.executable, "-c", LOADS.format(*contestants[name])]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            for kind, seconds in zip((name, f"{name}, again"), said.stdout.split(), strict=True):
                taken[kind].append(float(seconds))
    return {name: Timing(values) for name, values in taken.items()}


def scheduler(model: UNet, rounds: int | None) -> dict[str, Timing]:
    inputs = Rotation(lambda: (torch.randn(SHAPE), torch.randn(SHAPE)), CACHES)
    contestants: dict[str, Callable[[], object]] = {}
    for plain, fused in ((DDPMScheduler, FusedDDPMScheduler), (DDIMScheduler, FusedDDIMScheduler)):
        made = {plain.__name__: plain(), fused.__name__: fused()}
        if plain is DDPMScheduler:
            made[f"{fused.__name__}, noise_seed"] = fused(noise_seed=7)
        given, outputs = inputs.next(), {}
        for name, one in made.items():
            one.set_timesteps(1000)
            t = one.timesteps[400]
            outputs[name] = one.step(given[0], t, given[1], generator=torch.Generator().manual_seed(0)).prev_sample
            generator = torch.Generator().manual_seed(0)

            def step(one=one, t=t, generator=generator) -> object:
                o, x = inputs.next()
                return one.step(o, t, x, generator=generator)

            contestants[name] = step
        agree(f"scheduler: {fused.__name__}", outputs[fused.__name__], outputs[plain.__name__], 1e-5)
        if plain is DDPMScheduler:  # the same step with other noise
            z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
            own = ops.philox_normal(SHAPE, seed=7, t=int(t), stream=Stream.REVERSE)
            expected = outputs[plain.__name__] + made[plain.__name__]._get_variance(int(t)).sqrt() * (own - z)
            agree("scheduler: noise_seed", outputs[f"{fused.__name__}, noise_seed"], expected, 1e-5)
    return alternate(contestants, rounds=rounds or 60, label="scheduler")


def norms(model: UNet, rounds: int | None) -> dict[str, Timing]:
    before = diffusers_unet(model)
    after = copy.deepcopy(before)
    print(f"fuse_norms: {fuse_norms(after)}")
    contestants = {}
    for batch in (1, 16):
        x, t = torch.randn(batch, *model.shape), torch.full((batch,), 500)
        agree(f"norms: batch {batch}", after(x, t).sample, before(x, t).sample, 1e-4)
        contestants[f"batch {batch}"] = lambda x=x, t=t: before(x, t).sample
        contestants[f"batch {batch}, fused"] = lambda x=x, t=t: after(x, t).sample
    return alternate(contestants, rounds=rounds or 15, label="norms")


def sample(model: UNet, rounds: int | None) -> dict[str, Timing]:
    theirs = diffusers_unet(model)
    # Betas that do not magnify roundings, so that both images can be compared; their content does not matter here.
    options = {"seed": 0, "schedule": Schedule.linear(STEPS, 1e-4, 0.02), "progress": False}
    drawn = [fastddpm.sample(network, 16, **options) for network in (theirs, model)]
    agree("sample", *drawn, 1e-5)
    return alternate(
        {
            "UNet": lambda: fastddpm.sample(model, 16, **options),
            "UNet2DModel": lambda: fastddpm.sample(theirs, 16, **options),
        },
        rounds=rounds or 13,
        label="sample",
    )


CASES = {"load": load, "scheduler": scheduler, "norms": norms, "sample": sample}


def parse() -> argparse.Namespace:
    parser = arguments("What diffusers' objects and checkpoints gain and cost.")
    parser.add_argument("--only", choices=tuple(CASES), help="one of the cases; default all")
    parser.add_argument("--rounds", type=int, help="rounds of each case; default 10 to 60, by the case")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    settings = parser.parse_args()
    check_outputs(settings)
    return settings


def main() -> None:
    settings = parse()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    watched = Load(settings.force)
    model = the_network("cifar10")
    result: dict[str, object] = {"benchmark": "ecosystem", **provenance(settings), "cases": {}}
    bars, rows = [], []
    for name in [settings.only] if settings.only else CASES:
        timings = CASES[name](model, settings.rounds)
        result["cases"][name] = {contestant: timing.milliseconds() for contestant, timing in timings.items()}
        rows.append([name])
        for contestant, timing in timings.items():
            ms = timing.milliseconds()
            rows.append([contestant, *(f"{ms[key]:.2f}" for key in ("ms", "ms_p20", "ms_p80"))])
        for (contestant, peer, case), wanted in BARS.items():
            if case == name:
                ratio = timings[peer].median / timings[contestant].median
                bars.append(
                    {"bar": f"{contestant} / {peer}", "wanted": wanted, "ratio": ratio, "reached": ratio >= wanted}
                )
    print_table(["", "ms", "p20", "p80"], rows)
    print()
    print_table(
        ["times as fast", "measured", "wanted", ""],
        [[b["bar"], f"{b['ratio']:.2f}", f"{b['wanted']:.2f}", "pass" if b["reached"] else "FAIL"] for b in bars],
    )
    result |= {"bars": bars, "load": watched.report()}
    if settings.json is not None:
        write_json(settings.json, result)
    sys.exit(0 if all(bar["reached"] for bar in bars) else 1)


if __name__ == "__main__":
    main()
