"""What do fewer steps cost? Compare digits drawn by every sampler in 10 to 100 steps with the paper's 1000.

    python benchmarks/samplers.py --data mnist.npz --cache somewhere --json benchmarks/results/samplers.json --plot samplers.png

Quality is measured as in digits_quality.py: the share of samples to which its classifier gives a class with confidence
over 0.9, and the Frechet distance on its 64 features to the 10,000 test images, in units of the floor: the mean distance of
as many real images. The second part is the cost of a step of the paper's CIFAR-10 network outside the network, at batch 16:
the seconds of whole chains, including the timesteps' embeddings, without those of the network's calls. The bar is 1 ms.

Samples are drawn in batches and stored in --cache, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _harness import Load, arguments, check_inputs, check_outputs, print_table, provenance, write_json
from digits_quality import TRAINED_ON, certainty, checksum, floor, judged, recipe, trained
from tqdm.auto import tqdm

import fastddpm
from fastddpm import UNet
from fastddpm.checkpoints import fastddpm_folder
from fastddpm.engine import runner
from fastddpm.evaluation import distances, samples
from fastddpm.sampling import loop
from fastddpm.utils.files import atomic_write

STEPS = (100, 50, 20, 10)
FEW = (20, 10)
# label: (arguments of sample, numbers of steps)
CHAINS = {
    "ddpm": ({}, (1000, *STEPS)),
    "ddpm, fixed_large": ({"variance": "fixed_large"}, STEPS),
    "ddim": ({"sampler": "ddim"}, STEPS),
    "dpm++2m": ({"sampler": "dpm++2m"}, STEPS),
    "ddim, linspace": ({"sampler": "ddim", "spacing": "linspace"}, FEW),
    "ddim, leading": ({"sampler": "ddim", "spacing": "leading"}, FEW),
    "dpm++2m, trailing": ({"sampler": "dpm++2m", "spacing": "trailing"}, FEW),
}
OWN_STEPS, OWN_BATCH, OWN_ROUNDS, MOST_OWN = 10, 16, 3, 1.0

# ---------------------------------------------------------------------------------------------- quality


def quality(settings: argparse.Namespace) -> dict[str, object]:
    with np.load(settings.data) as arrays:
        x_train, y_train, x_test = (torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test"))
    path = settings.cache / f"classifier-{recipe(settings.data)}.safetensors"
    classifier = trained(path, x_train[:TRAINED_ON], y_train[:TRAINED_ON].long())
    held_features, held = judged(classifier, x_train[TRAINED_ON:])
    test = distances.statistics([judged(classifier, x_test)[0]])
    floors = floor(held_features, settings.n, test)
    mean_floor = statistics.mean(floors)

    model = UNet.from_pretrained(settings.model).to(settings.device)
    weights = checksum(fastddpm_folder.find_folder(settings.model) / fastddpm_folder.WEIGHTS)
    chains = [(label, options, steps) for label, (options, many) in CHAINS.items() for steps in many]
    rows = []
    for label, options, steps in tqdm(chains, desc="chains", unit="chain", disable=None):
        name = f"{weights[:12]}-{label.replace(', ', '-')}-{steps}-{settings.dtype}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fixed_large ruins images on purpose here
            shards = samples.draw(
                model, settings.cache / name, settings.n, seed=settings.seed, batch_size=settings.batch_size,
                dtype=getattr(torch, settings.dtype), device=settings.device, steps=steps, progress=False, **options,
            )  # fmt: skip
        pixels = torch.from_numpy(np.concatenate(list(shards.batches(settings.n))))
        seen, probabilities = judged(classifier, pixels)
        distance = distances.frechet(distances.statistics([seen]), test)
        confident, shares = certainty(probabilities)
        rows.append(
            {"chain": label, "steps": steps, "confident": confident, "class_shares": shares, "frechet": distance,
             "floors": distance / mean_floor}
        )  # fmt: skip
    return {
        "weights_sha256": weights,
        "data_sha256": checksum(settings.data),
        "floor": floors,
        "real_confident": certainty(held)[0],
        "rows": rows,
    }


def print_quality(result: dict[str, object]) -> None:
    print_table(
        ["chain", "steps", "confident", "floors"],
        [[r["chain"], str(r["steps"]), f"{r['confident']:.1%}", f"{r['floors']:.2f}"] for r in result["rows"]],
    )
    print(f"real digits: {result['real_confident']:.1%} confident")


def draw_chart(path: Path, rows: list[dict[str, object]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, title in (
        (axes[0], "floors", "Fréchet distance, in units of real digits' own"),
        (axes[1], "confident", "share with confidence over 0.9"),
    ):
        for label, (_, many) in CHAINS.items():
            points = sorted((r["steps"], r[key]) for r in rows if r["chain"] == label)
            axis.plot(*zip(*points, strict=True), "o-" if len(many) > len(FEW) else "x--", label=label, markersize=5)
        axis.set_xscale("log")
        axis.set_xticks([10, 20, 50, 100, 1000], ["10", "20", "50", "100", "1000"])
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------------- own time


def own(options: dict[str, object]) -> list[float]:
    """Return the milliseconds a step outside the network, one entry for each chain of OWN_STEPS steps."""
    torch.manual_seed(0)
    model = UNet.from_preset("cifar10").eval()
    inside = [0.0]
    predict = runner.EngineRunner.predict

    def timed(self, *args):
        start = time.perf_counter()
        o = predict(self, *args)
        inside[0] += time.perf_counter() - start
        return o

    taken = []
    run = loop.Chain.run

    def timed_run(self, *args):
        inside[0], start = 0.0, time.perf_counter()
        run(self, *args)
        taken.append(1e3 * (time.perf_counter() - start - inside[0]) / OWN_STEPS)

    runner.EngineRunner.predict, loop.Chain.run = timed, timed_run
    try:
        for _ in range(OWN_ROUNDS + 1):
            fastddpm.sample(model, OWN_BATCH, steps=OWN_STEPS, seed=0, dtype=torch.bfloat16, progress=False, **options)
    finally:
        runner.EngineRunner.predict, loop.Chain.run = predict, run
    return taken[1:]


def owns() -> dict[str, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "ddpm": own({}),
            "ddim": own({"sampler": "ddim"}),
            "ddim, eta 1": own({"sampler": "ddim", "eta": 1.0}),
            "dpm++2m": own({"sampler": "dpm++2m"}),
        }


def parse() -> argparse.Namespace:
    parser = arguments("What do fewer steps cost?")
    parser.add_argument("--model", default="digits", help="a bundled model's name or a folder")
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the classifier and the samples")
    parser.add_argument("--n", type=int, default=1000, help="number of samples of each chain")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--batch-size", type=int, default=100, help="images per forward pass")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="arithmetic of the network"
    )
    parser.add_argument("--device", default="cpu", help="where to sample")
    parser.add_argument("--only", choices=("quality", "own"), help="one of the two parts")
    settings = parser.parse_args()
    check_outputs(settings)
    if settings.n < 2:
        sys.exit(f"--n: got {settings.n}; expected at least 2")
    check_inputs(settings)
    return settings


def main() -> None:
    settings = parse()
    content = {"benchmark": "samplers", **provenance(settings)}
    passed = True
    if settings.only != "quality":
        load = Load(settings.force)
        content["own_ms"] = owns()
        content["load"] = load.report()
        medians = {name: statistics.median(taken) for name, taken in content["own_ms"].items()}
        passed = max(medians.values()) <= MOST_OWN
        print_table(
            ["a step outside the network", "ms", "bar", ""],
            [[n, f"{m:.2f}", f"<= {MOST_OWN:g}", "pass" if m <= MOST_OWN else "FAIL"] for n, m in medians.items()],
        )
    if settings.only != "own":
        content["quality"] = quality(settings)
        print_quality(content["quality"])
        if settings.plot is not None:
            draw_chart(settings.plot, content["quality"]["rows"])
    if settings.json is not None:
        write_json(settings.json, content)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
