"""Which of the paper's choices matter? Its Table 2 in small, on 14x14 digits: six trainings, and a chain without noise.

    python benchmarks/ablations.py --data mnist.npz --cache somewhere \\
        --json benchmarks/results/ablations.json --plot benchmarks/results/ablations.png

The six trainings differ in the network's prediction (the posterior's mean, x_0 or epsilon) and in its objective: L, the
variational bound (Ho et al. 2020, eq. 5), or the unweighted squared error of the prediction, which for epsilon is L_simple
(eq. 14). Data, network, seed, number of steps, learning rate and the bound of 1.0 on the gradient's norm are the same for all
six; sigma^2 is fixed. The script measures of each:
  - the Frechet distance of its samples (all steps of the chain) to the test images, on the features of a classifier that is
    trained here on 14x14 digits, and the share of samples with a class of confidence over 0.9. The floor is the same
    distance of as many real images. It is not an Inception distance: its absolute value means nothing elsewhere;
  - bits per dimension of test images: the variational bound, at some timesteps of each image;
  - the minutes of its training.
The best by its samples then draws without injected noise (sigma = 0), and its samples turn into averages. For Gaussian data the
best possible network is known, and so is the effect: about 1e-5 of the variance is left.

The experiment is small: a network of 164,000 parameters, minutes of training instead of the paper's ten hours on eight TPU
cores, digits as images, and one seed. A small difference in it proves nothing. So short a training also favours epsilon: near
the end of the chain a network that predicts the mean or x_0 must reproduce x_t to within sigma_t = 0.01, which it first has to
learn. All arithmetic is float32, as bfloat16 does not resolve numbers near 1 that finely.

--cache stores trainings, samples and the classifier under names that depend on settings, data and the code that makes them, so
the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from _harness import arguments, check_inputs, check_outputs, print_table, provenance, write_json
from digits_quality import CONFIDENT, TRAINED_ON, Classifier, certainty, checksum, floor, judged
from digits_quality import recipe as classifier_recipe
from digits_quality import trained as trained_classifier
from tqdm.auto import tqdm

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, errors
from fastddpm.data import ArrayImages
from fastddpm.diffusion import bound
from fastddpm.evaluation.distances import Statistics, frechet, statistics
from fastddpm.evaluation.likelihood import likelihood
from fastddpm.models import config, unet
from fastddpm.training import loss
from fastddpm.training.recipe import Recipe
from fastddpm.training.trainer import CHECKPOINT, FIXED_VARIANCES, Trainer
from fastddpm.utils.files import atomic_write

SIDE = 14
NETWORK = UNetConfig(
    sample_size=SIDE,
    in_channels=1,
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_groups=8,
)  # the middle block has attention nevertheless
LOT = 100  # images drawn between two writes of the cache
SHOWN = 20  # samples of each in the plot
MEAN, STD = 0.3, 0.5  # of the pixels of the Gaussian data
QUICK = {"steps": 20, "n": 4, "likelihood_images": 8, "timesteps": 5}
QUICK_DIGITS = 1000  # training, held-out and test images of the classifier


@dataclasses.dataclass(frozen=True)
class Variant:
    prediction: str
    objective: str

    @property
    def name(self) -> str:
        return f"{self.prediction}-{self.objective}"

    @property
    def label(self) -> str:
        answer = {"sample": "x0"}.get(self.prediction, self.prediction)
        if self.objective == "bound":
            return f"{answer}, L"
        return f"{answer}, L_simple" if self.prediction == "epsilon" else f"{answer}, squared error"


# The paper's Table 2 has the mean and epsilon; it reports of x_0 only that it gave worse samples early on (section 3.2).
VARIANTS = [Variant(p, o) for p in ("mean", "sample", "epsilon") for o in ("bound", "simple")]

# ------------------------------------------------------------------------------------------------- digits


def halved(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28] -> uint8 [N, 1, 14, 14]: means of 2x2 pixels, rounded (halves to even)."""
    blocks = pixels.reshape(-1, SIDE, 2, SIDE, 2).astype(np.float32)
    return blocks.mean((2, 4)).round().astype(np.uint8)[:, None]


def enlarged(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, 14, 14] -> uint8 [N, 28, 28], what the classifier of digits_quality.py takes: each pixel four times."""
    return pixels[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A classifier of 14x14 digits, and its results for the real ones."""

    classifier: Classifier
    accuracy: float
    test: Statistics  # of the test images' features
    floors: list[float]  # the distance of as many real images to them
    confident: float  # the share of real images with confidence over CONFIDENT

    def of(self, samples: np.ndarray) -> dict[str, float]:
        """Judge samples, float32 [N, 1, 14, 14], rounded to 8 bits as for saving."""
        pixels = fastddpm.to_uint8(torch.from_numpy(samples))
        features, probabilities = judged(self.classifier, enlarged(pixels))
        confident, _ = certainty(probabilities)
        return {"frechet": frechet(statistics([features]), self.test), "confident": confident}


def judge(settings: argparse.Namespace, digits: dict[str, np.ndarray]) -> Judge:
    """Train a classifier on the first of the training images; the rest are for the floor."""
    count = QUICK_DIGITS if settings.quick else TRAINED_ON
    train, test = (enlarged(torch.from_numpy(halved(digits[name]))) for name in ("x_train", "x_test"))
    labels, wanted = (torch.from_numpy(digits[name]).long() for name in ("y_train", "y_test"))
    code = hashlib.sha256("".join(map(inspect.getsource, (halved, enlarged))).encode()).hexdigest()[:6]
    path = settings.cache / f"classifier-{SIDE}-{count}-{classifier_recipe(settings.data)}-{code}.safetensors"
    classifier = trained_classifier(path, train[:count], labels[:count])
    held_out = train[TRAINED_ON:]
    if settings.quick:
        test, wanted, held_out = test[:QUICK_DIGITS], wanted[:QUICK_DIGITS], held_out[:QUICK_DIGITS]
    features, probabilities = judged(classifier, test)
    accuracy = float((probabilities.argmax(1) == wanted).double().mean())
    held_features, held_probabilities = judged(classifier, held_out)
    real = statistics([features])
    return Judge(classifier, accuracy, real, floor(held_features, settings.n, real), certainty(held_probabilities)[0])


# ----------------------------------------------------------------------------------------------- trainings


def recipe(settings: argparse.Namespace, objective: str) -> Recipe:
    """Return the recipe, the same for all variants except for the objective."""
    return Recipe(
        objective=objective,
        steps=settings.steps,
        batch_size=64,
        lr=settings.lr,
        warmup=100,
        cooldown=settings.steps // 2,
        ema=0.995,
        ema_warmup=True,
        flips=False,
        seed=settings.seed,
        log_every=20,
        sample_every=0,
        save_every=200,
    )


def folder(settings: argparse.Namespace, variant: Variant) -> Path:
    """Return the folder of the variant's run; it depends on the recipe, network, data set and objective's code."""
    facts = (NETWORK, recipe(settings, variant.objective), settings.variance, checksum(settings.data))
    code = "".join(map(inspect.getsource, (halved, bound, loss, config, unet)))
    return settings.cache / f"{variant.name}-{hashlib.sha256(f'{facts} {code}'.encode()).hexdigest()[:12]}"


def train(settings: argparse.Namespace, variant: Variant, dataset: ArrayImages) -> dict[str, object]:
    """Train, resume or reuse the variant's run. Return {minutes, loss}, or {diverged: the step} if it diverged.

    Exit if the training is interrupted or takes more than --minutes: variants with different numbers of steps are not
    comparable.
    """
    out, device = folder(settings, variant), torch.device("cpu")
    if (out / CHECKPOINT).is_file():
        trainer = Trainer.resume(dataset, out, device)
    else:
        how = {"prediction": variant.prediction, "variance": settings.variance}
        trainer = Trainer(dataset, out, NETWORK, recipe(settings, variant.objective), device, **how)

    def seconds() -> float:
        return sum(float(entry["seconds"]) for entry in trainer.log)

    if trainer.step < trainer.total:
        allowed, began = 60 * settings.minutes - seconds(), time.perf_counter()
        late = threading.Timer(allowed, trainer.stop)
        late.start()
        try:
            trainer.run()
        except errors.TrainingError as error:  # it names a folder of the user's machine, so the result omits it
            print(f"{variant.label}: {error}", file=sys.stderr)
            return {"diverged": trainer.step}
        finally:
            late.cancel()
        if trainer.step < trainer.total:
            done = f"{variant.label}: step {trainer.step} of {trainer.total}"
            if time.perf_counter() - began < allowed:
                sys.exit(f"{done}: interrupted; the same command resumes")
            sys.exit(
                f"{done} after {settings.minutes:g} minutes. More --minutes (at most 5) resume it; fewer --steps "
                "restart all variants. Do other processes use the cores?"
            )
    return {"minutes": seconds() / 60, "loss": float(trainer.log[-1]["loss"])}


# ------------------------------------------------------------------------------------------------- samples


def drawn(model: UNet, out: Path, settings: argparse.Namespace, variance: str) -> np.ndarray:
    """Return the first n images of the seed's sequence, float32 [n, 1, 14, 14], cached ones from the cache."""
    path = out / f"samples-{variance}-seed{settings.seed}.npy"
    done = np.load(path) if path.is_file() else np.empty((0, *model.shape), np.float32)
    begun, label = min(len(done), settings.n), f"{out.name.rpartition('-')[0]}, {variance}"
    with tqdm(total=settings.n, initial=begun, desc=label, unit="image", disable=None) as bar:
        while len(done) < settings.n:
            count = min(LOT, settings.n - len(done))
            images = fastddpm.sample(
                model, count, first=len(done), seed=settings.seed, variance=variance, batch_size=LOT, progress=False
            )
            done = np.concatenate((done, images.numpy()))
            with atomic_write(path) as temporary:
                np.save(temporary, done)
            bar.update(count)
    return done[: settings.n]


def pixel_variance(x: np.ndarray) -> float:
    """Return the mean over pixels of their variance across images [N, ...] in [-1, 1]."""
    return float(x.astype(np.float64).var(0, ddof=1).mean())


def gaussian(variance: str) -> float:
    """Return the share of the variance of pixels ~ N(MEAN, STD^2) left by the whole chain, with their best network.

    That network's epsilon is E[eps | x_t] = sqrt(1 - abar) (x_t - sqrt(abar) MEAN) / (abar STD^2 + 1 - abar).
    """
    schedule = Schedule.linear()
    abar = schedule.alphas_cumprod
    slope = (1 - abar).sqrt() / (abar * STD**2 + 1 - abar)
    shift = -slope * abar.sqrt() * MEAN

    def ideal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return slope[t].float()[:, None, None, None] * x + shift[t].float()[:, None, None, None]

    x = fastddpm.sample(
        ideal, 64, shape=(1, 32, 32), schedule=schedule, variance=variance, clip=False, seed=0, progress=False
    )
    return float(x.double().var()) / STD**2


# ----------------------------------------------------------------------------------------------- the output


def plot(
    path: Path, rows: dict[str, np.ndarray], frechets: dict[str, float], real: float, bits: dict[str, float]
) -> None:
    """Plot rows of samples over bars of Frechet distance (the dashed line is the floor) and of bits per dimension."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4 + 0.5 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(0.5 * len(rows), 3.5))
    axes = top.subplots(len(rows), 1)
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        strip = np.concatenate([np.pad(image[0], 1, constant_values=1.0) for image in images[:SHOWN]], axis=1)
        axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, aspect="equal")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    left, right = bottom.subplots(1, 2)
    for axis, values, title in (
        (left, frechets, "Frechet distance of samples to test images (a classifier's features)"),
        (right, bits, "bits per dimension of test images (variational bound)"),
    ):
        axis.bar_label(axis.barh(list(values), list(values.values())), fmt="%.4g", padding=3)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        if max(values.values()) > 20 * min(values.values()):
            axis.set_xscale("log")
        axis.margins(x=0.15)
    left.axvline(real, color="black", linestyle="--", linewidth=1)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = arguments("Compare the paper's choices of prediction and objective on 14x14 digits.", timed=False)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw samples and bars (needs matplotlib)")
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--cache", type=Path, required=True, help="folder for trainings, samples and the classifier")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each training")
    parser.add_argument("--minutes", type=float, default=3.0, help="time limit of each training, at most 5")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of all trainings")
    parser.add_argument("--variance", choices=FIXED_VARIANCES, default="fixed_large", help="of all reverse steps")
    parser.add_argument("--n", type=int, default=1000, help="samples to judge of each variant")
    parser.add_argument("--likelihood-images", type=int, default=1000, help="test images whose bits are counted")
    parser.add_argument("--timesteps", type=int, default=50, help="timesteps of each such image, besides t = 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of trainings, samples and the bound's noise")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    parser.add_argument("--quick", action="store_true", help="a smoke run: far too little of everything")
    settings = parser.parse_args()
    check_outputs(settings)
    if settings.quick:
        for name, value in QUICK.items():
            setattr(settings, name, value)
    for name, least in (("steps", 1), ("n", 2), ("likelihood_images", 2), ("timesteps", 1)):
        if getattr(settings, name) < least:
            sys.exit(f"--{name.replace('_', '-')}: got {getattr(settings, name)}; expected at least {least}")
    if not 0 < settings.minutes <= 5:
        sys.exit(f"--minutes: got {settings.minutes:g}; expected more than 0 and at most 5")
    check_inputs(settings)
    return settings


def main() -> None:
    settings = parse()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with np.load(settings.data) as arrays:
        digits = {name: arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    dataset = ArrayImages(halved(digits["x_train"]), None, settings.data.name)
    test = halved(digits["x_test"])

    by = judge(settings, digits)
    mean_floor = sum(by.floors) / len(by.floors)
    print(f"classifier: {by.accuracy:.2%} right on the test images, halved")

    results: dict[Variant, dict[str, object]] = {}
    for number, variant in enumerate(VARIANTS, 1):
        print(f"training {number} of {len(VARIANTS)}: {variant.label}", flush=True)
        results[variant] = train(settings, variant, dataset)
    shown = {"test images": test[:SHOWN] / 127.5 - 1}
    models: dict[Variant, UNet] = {}
    for variant, result in results.items():
        if "diverged" in result:
            continue
        models[variant] = model = UNet.from_pretrained(folder(settings, variant))
        samples = drawn(model, folder(settings, variant), settings, settings.variance)
        shown[variant.label] = samples
        bound = likelihood(
            model,
            torch.from_numpy(test[: settings.likelihood_images]),
            subsample=settings.timesteps,
            seed=settings.seed,
        )
        result |= by.of(samples) | {
            "pixel_variance": pixel_variance(samples),
            "bits_per_dim": bound.bits_per_dim,
            "bits_per_dim_interval": bound.interval,
        }
    if not models:
        sys.exit("every training diverged; pass a lower --lr")

    best = min(models, key=lambda variant: results[variant]["frechet"])
    bare = drawn(models[best], folder(settings, best), settings, "none")
    shown[f"{best.label}, no noise"] = bare
    data_variance = pixel_variance(test / 127.5 - 1)
    without = {"of": best.name, **by.of(bare), "pixel_variance": pixel_variance(bare)}
    left = {variance: gaussian(variance) for variance in ("fixed_large", "fixed_small", "none")}

    rows = []
    for variant, result in results.items():
        if "diverged" in result:
            rows.append([variant.label, *["-"] * 5])
            print(f"{variant.label}: the training diverged at step {result['diverged']}")
            continue
        low, high = result["bits_per_dim_interval"]
        rows.append(
            [
                variant.label,
                f"{result['frechet']:.4g}",
                f"{result['frechet'] / mean_floor:.1f}",
                f"{result['confident']:.1%}",
                f"{result['bits_per_dim']:.3f} +- {(high - low) / 2:.3f}",
                f"{result['minutes']:.1f}",
            ]
        )
    rows.append(
        [f"{best.label}, no noise", f"{without['frechet']:.4g}", f"{without['frechet'] / mean_floor:.1f}",
         f"{without['confident']:.1%}", "", ""]
    )  # fmt: skip
    rows.append(["real images", f"{mean_floor:.4g}", "1.0", f"{by.confident:.1%}", "", ""])
    print_table(["", "Frechet", "times floor", f"confidence > {CONFIDENT}", "bits/dim", "minutes"], rows)
    print(
        f"variance of a pixel across images: test images {data_variance:.4g}; {best.label} "
        f"{results[best]['pixel_variance']:.4g}, without injected noise {without['pixel_variance']:.4g} "
        f"({without['pixel_variance'] / data_variance:.2g} of the test images')"
    )
    print(
        f"Gaussian data, ideal network: the chain's variance is {left['fixed_large']:.4f} of the data's with fixed_large, "
        f"{left['fixed_small']:.4f} with fixed_small, {left['none']:.2g} without injected noise"
    )
    if settings.plot is not None:
        plot(
            settings.plot,
            shown,
            {v.label: results[v]["frechet"] for v in models} | {f"{best.label}, no noise": without["frechet"]},
            mean_floor,
            {v.label: results[v]["bits_per_dim"] for v in models},
        )
    if settings.json is not None:
        write_json(
            settings.json,
            {
                "benchmark": "ablations",
                **provenance(settings),
                "data_sha256": checksum(settings.data),
                "network": dataclasses.asdict(NETWORK),
                "parameters": sum(p.numel() for p in UNet(NETWORK).parameters()),
                "recipe": dataclasses.asdict(recipe(settings, "simple")) | {"objective": "of the variant"},
                "classifier": {"test_accuracy": by.accuracy},
                "real": {"frechet": by.floors, "confident": by.confident, "pixel_variance": data_variance},
                "variants": {variant.name: result for variant, result in results.items()},
                "no_injected_noise": without,
                "gaussian_variance_left": left,
            },
        )


if __name__ == "__main__":
    main()
