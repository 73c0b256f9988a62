"""End to end: steps of the paper's chain a second with the CIFAR-10 network, against diffusers with the same weights.

    python benchmarks/steps_per_sec.py [--batch 1 16] [--json PATH] [--plot PATH]

A step is the whole of it: the network, the posterior mean, fresh noise. Parity first: each contestant's prediction is
held against the network in float64 before anybody is timed. Then all contestants take turns, and with them two matrix
products that say what this machine could do: "of matmul" is the share of the step that the network's 6.22 GMAC an
image would take at that rate.

fastddpm runs the loop that `fastddpm.sample` runs; what it prepares once for each call (a copy of the network, the
timestep embeddings of all 1000 steps) is measured beside it as "setup", and counts in images/s. diffusers runs the
loop of its DDPMPipeline. "memory" is the weights and what a step adds at its peak.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _harness import Load, Timing, alternate, arguments, bar_chart, check_outputs, print_table, provenance, write_json
from torch import nn
from tqdm.auto import tqdm

from fastddpm import Schedule, UNet, backend, memory, samplers
from fastddpm.engine import network
from fastddpm.sampling import _Chain

try:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # UNet2DModel warns of casts even where none of its layers minds
except ImportError:
    DDPMScheduler = UNet2DModel = None

T = 1000
MACS = 6.22e9  # of one image through the network: convolutions, linear layers, attention
SIDE = 2048  # of the matrices whose product is the machine's limit
PROBE = 500  # timestep at which predictions are compared
PEER = "diffusers, as it comes"
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 5e-2}  # rms error / rms of the prediction

MATMULS = {torch.float32: "matmul float32", torch.bfloat16: "matmul bfloat16"}


@dataclasses.dataclass
class Contestant:
    dtype: torch.dtype
    predict: Callable[[torch.Tensor], torch.Tensor]  # x [B, 3, 32, 32] float32 at timestep PROBE -> noise
    # Seconds of k steps, behind one that is not timed: only a chain's first meets memory that is new to the process.
    steps: Callable[[int], float]
    weights: int  # bytes that stay for the whole chain
    setup: float = 0.0  # seconds, once for each chain


def the_network() -> UNet:
    """The paper's CIFAR-10 network, with weights that let every layer count: a fresh one has layers close to zero."""
    torch.manual_seed(0)
    model = UNet.from_preset("cifar10").eval().requires_grad_(False)
    for name, layer in model.named_modules():
        if name.endswith(("conv2", "conv_out", "to_out.0")):
            nn.init.xavier_uniform_(layer.weight, 0.5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    return model


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --------------------------------------------------------------------------------------------- contestants


def standing_bytes() -> int:
    """What the process has resident, after giving back what it has freed; 0 where the system does not tell."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
    return resident("VmRSS")


def resident(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    return 0


def added_at_peak(call: Callable[[], object]) -> int | None:
    """The most that is resident during the call, less what was before it; None where the system does not tell."""
    before = standing_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # makes the peak, VmHWM, start again from now
    except OSError:
        return None
    call()
    return max(0, resident("VmHWM") - before)


@contextlib.contextmanager
def ours(model: UNet, batch: int, dtype: torch.dtype, name: str) -> Iterator[Contestant]:
    """fastddpm.sample's own loop on backend `name`, over the first steps of the full chain's table."""
    before, start = standing_bytes(), time.perf_counter()
    table = samplers.ddpm(Schedule.linear(T))
    with network(model, torch.device("cpu"), dtype) as net:
        with backend.use(name):
            chain = _Chain(net, table, (batch, *model.shape), 1.0, 0, torch.device("cpu"))
        x_T = torch.randn(batch, *model.shape)
        bar = tqdm(disable=True)

        def steps(k: int) -> float:
            with backend.use(name), memory.kept(torch.device("cpu")):
                for chain.steps in (1, k):
                    start = time.perf_counter()
                    chain.run(0, batch, x_T, None, bar, None)
                    taken = time.perf_counter() - start
            return taken

        def predict(x: torch.Tensor) -> torch.Tensor:
            chain.input.copy_(x)
            with backend.use(name):
                return chain._predict(T - 1 - PROBE, None)

        usual = steps(1)  # two steps: the first packs the weights, which belongs to the setup
        setup = time.perf_counter() - start - 2 * usual
        # The caller's network stays beside the copy that the chain works with.
        yield Contestant(dtype, predict, steps, weight_bytes(model) + max(0, standing_bytes() - before), setup)


@contextlib.contextmanager
def theirs(model: UNet, batch: int, dtype: torch.dtype, tuned: bool, compiled: bool = False) -> Iterator[Contestant]:
    """The loop of diffusers' DDPMPipeline. tuned: the network channels_last in `dtype`, the chain in float32 still."""
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,  # one head
        downsample_padding=0,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    unet.load_state_dict(model.state_dict())
    unet.eval().requires_grad_(False)
    if tuned:
        unet.to(dtype, memory_format=torch.channels_last)
    weights = weight_bytes(unet)
    call = torch.compile(unet, options={"freezing": True}) if compiled else unet
    scheduler = DDPMScheduler(T, beta_schedule="linear", variance_type="fixed_large", clip_sample=True)
    scheduler.set_timesteps(T)
    x_T = torch.randn(batch, *model.shape)

    def predict(x: torch.Tensor, t: torch.Tensor = scheduler.timesteps[T - 1 - PROBE]) -> torch.Tensor:
        if tuned:
            return call(x.to(dtype, memory_format=torch.channels_last), t).sample.float()
        return call(x, t).sample

    def steps(k: int) -> float:
        for count in (1, k):
            x, start = x_T, time.perf_counter()
            for t in scheduler.timesteps[:count]:
                x = scheduler.step(predict(x, t), t, x).prev_sample
        return time.perf_counter() - start

    yield Contestant(dtype, predict, steps, weights)


def contestants(model: UNet, batch: int, compiled: bool) -> dict[str, contextlib.AbstractContextManager[Contestant]]:
    f32, bf16 = torch.float32, torch.bfloat16
    entered = {"fastddpm reference": ours(model, batch, f32, "reference")}
    if backend.native is not None:
        entered["fastddpm cpu"] = ours(model, batch, f32, "cpu")
        entered["fastddpm cpu, bfloat16"] = ours(model, batch, bf16, "cpu")
    if UNet2DModel is not None:
        entered[PEER] = theirs(model, batch, f32, tuned=False)
        entered["diffusers, bfloat16 channels_last"] = theirs(model, batch, bf16, tuned=True)
        if compiled:
            entered["diffusers, the same, torch.compile"] = theirs(model, batch, bf16, tuned=True, compiled=True)
    return entered


# ------------------------------------------------------------------------------------------------- the run


def check_parity(field: dict[str, Contestant], model: UNet, batch: int) -> dict[str, float]:
    """rms error / rms of each contestant's prediction for two images; ends the run where one is over its tolerance."""
    x = torch.randn(batch, *model.shape)
    with backend.use("reference"):
        few = x[:2].double()
        truth = copy.deepcopy(model).double()(few, torch.full((len(few),), PROBE))
    errors = {}
    for name, contestant in field.items():
        error = contestant.predict(x)[:2].double() - truth
        errors[name] = float(error.square().mean().sqrt() / truth.square().mean().sqrt())
        if not errors[name] <= TOLERANCE[contestant.dtype]:  # a NaN is not
            sys.exit(f"{name} is wrong: error {errors[name]:.2g}, allowed {TOLERANCE[contestant.dtype]:.2g}; not timed")
    return errors


def matmul(dtype: torch.dtype) -> Callable[[], object]:
    a, b, out = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def measure(model: UNet, batch: int, settings: argparse.Namespace) -> dict[str, object]:
    """All contestants at one batch size, as it goes into the JSON."""
    per_turn = settings.steps or (1 if batch >= 8 else 4)
    with contextlib.ExitStack() as stack:
        field = {name: stack.enter_context(c) for name, c in contestants(model, batch, settings.compile).items()}
        errors = check_parity(field, model, batch)
        peaks = {name: added_at_peak(lambda c=c: c.steps(1)) for name, c in field.items()}
        calls = {name: lambda c=c: c.steps(per_turn) for name, c in field.items()}
        limits = {name: matmul(dtype) for dtype, name in MATMULS.items()}
        timings = alternate(
            {**calls, **limits},
            self_timed=calls,
            rounds=settings.rounds,
            seconds=settings.seconds,
            label=f"batch {batch}",
        )
    flops = {dtype: 2 * SIDE**3 / timings[name].median for dtype, name in MATMULS.items()}
    step = {name: Timing([s / per_turn for s in timings[name].seconds]) for name in field}
    peers = [step[name].median for name in field if name.startswith("diffusers")]
    results = {}
    for name, contestant in field.items():
        median = step[name].median
        results[name] = {
            **step[name].milliseconds(),
            "steps_per_s": 1 / median,
            "images_per_s": batch / (contestant.setup + T * median),
            "setup_ms": 1e3 * contestant.setup,
            "memory_mb": None if peaks[name] is None else (contestant.weights + peaks[name]) / 2**20,
            "share_of_matmul": 2 * MACS * batch / flops[contestant.dtype] / median,
            "times_faster_than_diffusers": step[PEER].median / median if PEER in step else None,
            "times_faster_than_best_peer": min(peers) / median if peers else None,
            "error": errors[name],
        }
    rates = {name: flops[dtype] / 1e9 for dtype, name in MATMULS.items()}
    return {"batch": batch, "steps_per_turn": per_turn, "matmul_gflop_per_s": rates, "contestants": results}


def table(results: list[dict]) -> None:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = []
    for result in results:
        rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result["matmul_gflop_per_s"].items())
        rows.append([f"batch {result['batch']} (here {rates})"])
        for name, c in result["contestants"].items():
            rows.append(
                [
                    f"  {name}",
                    f"{c['ms']:.1f}",
                    f"{c['ms_p20']:.1f}",
                    f"{c['ms_p80']:.1f}",
                    f"{c['steps_per_s']:.3g}",
                    f"{c['images_per_s']:.3g}",
                    f"{c['setup_ms']:.0f}",
                    cell(c["memory_mb"], ".0f"),
                    f"{c['share_of_matmul']:.0%}",
                    cell(c["times_faster_than_diffusers"], ".2f"),
                    cell(c["times_faster_than_best_peer"], ".2f"),
                ]
            )
    header = ["", "ms a step", "p20", "p80", "steps/s", "images/s", "setup ms", "memory MB", "of matmul"]
    print_table([*header, "x diffusers", "x best peer"], rows)


def main() -> None:
    parser = arguments(
        "Time whole steps of the chain with the CIFAR-10 network, beside diffusers with the same weights."
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images at once")
    parser.add_argument("--steps", type=int, help="steps in one turn; default 1, or 4 at batches below 8")
    parser.add_argument("--rounds", type=int, help="turns of each contestant; default what fits into --seconds")
    parser.add_argument("--seconds", type=float, default=40.0, help="time spent on each batch size, after the warm-up")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="where to measure")
    parser.add_argument("--compile", action="store_true", help="diffusers under torch.compile as well (takes minutes)")
    settings = parser.parse_args()
    check_outputs(settings)
    for name in ("steps", "rounds"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            sys.exit(f"--{name}: got {getattr(settings, name)}; expected at least 1")
    if min(settings.batch) < 1:
        sys.exit(f"--batch: got {settings.batch}; expected numbers >= 1")
    torch.set_grad_enabled(False)
    if backend.native is None:
        print(f"no compiled kernels here: {backend.unavailable('cpu')}; only the reference backend is timed")
    if UNet2DModel is None:
        print("diffusers is not installed: there is no peer to compare with (pip install diffusers)")

    load = Load(settings.force)
    model = the_network()
    results = [measure(model, batch, settings) for batch in settings.batch]
    table(results)
    loaded = load.report()
    if settings.json is not None:
        content = {"benchmark": "steps_per_sec", **provenance(settings), "load": loaded, "results": results}
        write_json(settings.json, content)
    if settings.plot is not None:
        panels = {
            f"batch {r['batch']}": {name: c["steps_per_s"] for name, c in r["contestants"].items()} for r in results
        }
        bar_chart(settings.plot, "Steps of the chain a second, CIFAR-10 network, longer is better", "steps/s", panels)


if __name__ == "__main__":
    main()
