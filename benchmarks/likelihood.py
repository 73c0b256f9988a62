"""Measure the bundled digits' variational bound on MNIST's test images in bits/dim, its time, and rate and distortion.

    python benchmarks/likelihood.py --data mnist.npz --json likelihood.json --plot likelihood.png

The measurements and their bars:
  - time: the bound of 64 digits against the network's own forward over as many evaluations, same engine, same batch: at most
    1.1 times. Only --timed timesteps of each image are evaluated, so one-time costs weigh more than in the whole bound.
  - the bound of --images test images from all timesteps, with its rate-distortion curve (the paper's figure 5 and table 4):
    rate(T) + L_0 is the bound, the rate never falls, and at every twentieth of the steps the distortion does not rise by more
    than two standard errors.
  - the bound of --estimated test images from --subsample drawn timesteps each; on the images common to both, it agrees
    with the one from all timesteps within four standard errors; the known terms give the standard error of the draws.

Digits are padded to 32x32 with black, like the model's training images. The padding costs next to nothing, so bits per
dimension, over all 1024 pixels, are not those of 28x28 digits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _harness import Load, alternate, arguments, check_inputs, check_outputs, print_table, provenance, write_json

import fastddpm
from fastddpm.data import ArrayImages
from fastddpm.engine import memory
from fastddpm.engine.cache import acquire_runner
from fastddpm.evaluation.likelihood import Likelihood, RateDistortion, likelihood, rate_distortion, strata
from fastddpm.inputs.resolve import resolve

TIMED_IMAGES = 64
MOST_TIMES_FORWARD = 1.1
PREPARED = 8  # input batches that the bare network uses in turn

# --------------------------------------------------------------------------------------------------- time


def forward(model: fastddpm.UNet, settings: argparse.Namespace, batches: int) -> Callable[[], float]:
    """Return a call that times `batches` forwards of the engine, in seconds, with inputs in its layout and dtype."""
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    shape = (settings.batch_size, *model.shape)
    noise = [torch.randn(shape, device=device) for _ in range(PREPARED)]
    t = torch.randint(len(model.schedule), (PREPARED, settings.batch_size), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def call() -> float:
        resolved = resolve(model)
        with (
            torch.no_grad(),
            memory.retain_freed_memory(device),
            acquire_runner(resolved, device, dtype, shape) as entry,
        ):
            net = entry.runner
            inputs = [x.to(net.dtype, memory_format=net.memory_format) for x in noise]
            rows = [net.time_inputs_per_image(steps) for steps in t]
            wait()
            start = time.perf_counter()
            with net.execution_context():
                for i in range(batches):
                    net.predict(inputs[i % PREPARED], rows[i % PREPARED], None)
            wait()
            return time.perf_counter() - start

    return call


def timed(model: fastddpm.UNet, images: torch.Tensor, settings: argparse.Namespace) -> dict[str, object]:
    options = {"subsample": settings.timed} if settings.timed < len(model.schedule) else {}
    options |= common(settings)
    evaluations = likelihood(model, images, **options).evaluations
    batches = math.ceil(evaluations / settings.batch_size)
    contestants = {
        "forward": forward(model, settings, batches),
        "likelihood": lambda: likelihood(model, images, **options),
    }
    timings = alternate(contestants, self_timed=("forward",), rounds=settings.rounds, label="time")
    ratio = timings["likelihood"].median / timings["forward"].median
    return {
        "images": len(images),
        "evaluations": evaluations,
        **{name: timing.milliseconds() for name, timing in timings.items()},
        "times_forward": ratio,
    }


# ------------------------------------------------------------------------------------------------- figures


def common(settings: argparse.Namespace) -> dict[str, object]:
    return {
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "device": settings.device,
        "dtype": getattr(torch, settings.dtype),
    }


def figures(bound: Likelihood) -> dict[str, object]:
    return {
        "images": len(bound.per_image),
        "evaluations": bound.evaluations,
        "bits_per_dim": bound.bits_per_dim,
        "standard_error": bound.standard_error,
        "interval": bound.interval,
        "L_T": bound.prior,
        "L_0": float(bound.terms[0]),
        "between": bound.bits_per_dim - bound.prior - float(bound.terms[0]),
    }


def twentieths(curve: RateDistortion) -> list[int]:
    """Return numbers of reverse steps, rising."""
    T = len(curve.rate)
    return sorted({max(1, T * part // 20) for part in range(1, 21)})


def curve_passes(curve: RateDistortion) -> dict[str, bool]:
    whole = float(curve.rate[-1] + curve.likelihood.terms[0])
    at = torch.tensor(twentieths(curve)) - 1
    distortion, error = curve.distortion[at], curve.distortion_error[at]
    slack = 2 * (error[1:].square() + error[:-1].square()).sqrt()
    return {
        "rate_and_decoder_are_the_bound": math.isclose(whole, curve.likelihood.bits_per_dim, rel_tol=1e-9),
        "rate_never_falls": bool((curve.rate.diff() >= 0).all()),
        "distortion_falls": bool((distortion.diff() <= slack).all()),
    }


def agrees(estimate: Likelihood, whole: Likelihood, subsample: int) -> dict[str, float | bool]:
    """Compare the two on their common images. All terms give a draw's variance: few images may miss the large ones."""
    n = min(len(estimate.per_image), len(whole.per_image))
    parts = [whole.terms[low:high] for low, high in itertools.pairwise(strata(len(whole.terms), subsample))]
    error = math.sqrt(sum(len(part) ** 2 * float(part.var(correction=0)) for part in parts) / n)
    difference = float((estimate.per_image[:n] - whole.per_image[:n]).mean())
    return {"images": n, "difference": difference, "error": error, "agrees": abs(difference) <= 4 * error}


def parse() -> argparse.Namespace:
    parser = arguments("Bits per dimension of the bundled digits on MNIST's test images.")
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz, with x_test")
    parser.add_argument("--model", default="digits", help="a bundled model's name, or a folder")
    parser.add_argument("--images", type=int, default=64, help="test images for which all timesteps are evaluated")
    parser.add_argument("--estimated", type=int, default=10_000, help="test images with drawn timesteps; 0: none")
    parser.add_argument("--subsample", type=int, default=20, help="how many are drawn for each image")
    parser.add_argument("--timed", type=int, default=100, help="timesteps of each image in the timing; 0: no timing")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and timesteps")
    parser.add_argument("--batch-size", type=int, default=64, help="evaluations per forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of the network")
    parser.add_argument("--device", default="cpu", help="where to evaluate")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    settings = parser.parse_args()
    check_outputs(settings)
    if settings.images < 2 or (settings.estimated and settings.estimated < 2):
        parser.error("--images, --estimated: at least 2 images have a standard error")
    check_inputs(settings)
    return settings


def main() -> None:
    settings = parse()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    load = Load(settings.force)
    model = fastddpm.UNet.from_pretrained(settings.model).to(settings.device)
    with np.load(settings.data) as arrays:
        images = ArrayImages(arrays["x_test"][:, None], None, settings.data.name).pad_to(model.shape[1]).pixels
    result: dict[str, object] = {"benchmark": "likelihood", **provenance(settings)}
    passed: dict[str, bool] = {}

    if settings.timed:
        time_taken = result["time"] = timed(model, images[:TIMED_IMAGES], settings)
        passed["time"] = time_taken["times_forward"] <= MOST_TIMES_FORWARD
        print(
            f"{time_taken['evaluations']} evaluations: the network alone {time_taken['forward']['ms'] / 1e3:.2f} s, "
            f"the bound {time_taken['likelihood']['ms'] / 1e3:.2f} s, {time_taken['times_forward']:.3f} times that"
        )

    curve = rate_distortion(model, images[: settings.images], **common(settings))
    print(f"\nall timesteps: {curve.likelihood}\n\n{curve}\n")
    result["all_timesteps"] = figures(curve.likelihood)
    result["rate_distortion"] = [
        {
            "reverse_steps": k,
            "rate": float(curve.rate[k - 1]),
            "rate_error": float(curve.rate_error[k - 1]),
            "distortion": float(curve.distortion[k - 1]),
            "distortion_error": float(curve.distortion_error[k - 1]),
        }
        for k in twentieths(curve)
    ]
    passed |= curve_passes(curve)

    if settings.estimated:
        estimate = likelihood(model, images[: settings.estimated], subsample=settings.subsample, **common(settings))
        print(f"{settings.subsample} drawn timesteps: {estimate}\n")
        result["drawn_timesteps"] = figures(estimate)
        both = result["drawn_against_all"] = agrees(estimate, curve.likelihood, settings.subsample)
        passed["estimate_agrees"] = both["agrees"]

    print_table(["bar", ""], [[name, "pass" if ok else "FAIL"] for name, ok in passed.items()])
    result |= {"load": load.report(), "passed": passed}
    if settings.json is not None:
        write_json(settings.json, result)
    if settings.plot is not None:
        curve.plot(settings.plot)
        print(f"wrote {settings.plot}")
    sys.exit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
