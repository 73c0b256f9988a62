"""How good are the digits? A classifier trained here judges samples of a digits model against real MNIST.

    python benchmarks/digits_quality.py digits --data mnist.npz --cache somewhere --json benchmarks/results/digits.json

The bars:
  - the classifier, trained on the first 50,000 training images, is right on at least 99 % of the test images;
  - at least 90 % of the samples get a class with confidence over 0.9;
  - every class has 5 % to 16 % of them;
  - the Frechet distance (Heusel et al. 2017) on the classifier's 64 features, samples against the 10,000 test images,
    is at most 4 times the floor: the mean of the same distance over 20 draws of as many real images from the 10,000
    training images that the classifier has not seen. Its absolute value means nothing elsewhere: it is not an
    Inception distance.

Samples are rounded to 256 grey values, as for saving, before they are judged. Images are drawn and cached in small
batches, so that an interrupted run resumes; the classifier is cached too.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from _harness import arguments, check_inputs, check_outputs, print_table, provenance, write_json
from torch import nn
from tqdm.auto import tqdm

import fastddpm
from fastddpm.checkpoints import fastddpm_folder
from fastddpm.evaluation.distances import Statistics, frechet, statistics
from fastddpm.utils.files import atomic_write

TRAINED_ON = 50_000  # of the 60,000 training images; the rest are the held-out ones
EPOCHS, BATCH, RATE, SHIFT, SEED = 4, 128, 3e-3, 2, 0
DRAWS = 20
LOT = 100  # images drawn between two writes of the cache

LEAST_ACCURACY = 0.99
CONFIDENT, LEAST_CONFIDENT = 0.9, 0.90
CLASS_SHARE = (0.05, 0.16)
MOST_TIMES_FLOOR = 4.0

# --------------------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """A small convolutional network, [N, 1, 32, 32] -> 64 features -> 10 classes; 168,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [N, 64], logits [N, 10])."""
        features = self.layers(x)
        return features, self.head(features)


def scaled(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 28, 28] or [N, 1, 32, 32] -> float32 [N, 1, 32, 32] in [-1, 1], digits in the middle of the square."""
    pixels = pixels.reshape(len(pixels), 1, *pixels.shape[-2:])
    margin = (32 - pixels.shape[-1]) // 2
    return F.pad(pixels.float() / 127.5 - 1, [margin] * 4, value=-1.0)


def shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to SHIFT pixels: all the augmentation that digits need."""
    n, _, height, width = x.shape
    moves = torch.randint(0, 2 * SHIFT + 1, (2, n), generator=generator)
    rows = moves[0, :, None] + torch.arange(height)
    columns = moves[1, :, None] + torch.arange(width)
    padded = F.pad(x, [SHIFT] * 4, value=-1.0)[:, 0]
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def train(pixels: torch.Tensor, labels: torch.Tensor) -> Classifier:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Classifier().to(memory_format=torch.channels_last)
    steps = len(pixels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=EPOCHS * steps)
    with tqdm(total=EPOCHS * steps, desc="classifier", unit="step", disable=None) as bar:
        for _ in range(EPOCHS):
            for index in torch.randperm(len(pixels), generator=generator)[: steps * BATCH].view(steps, BATCH):
                x = shifted(scaled(pixels[index]), generator).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(model(x)[1], labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def recipe(data: Path) -> str:
    """Return a name that identifies the data, the constants and the code that make the classifier."""
    code = "".join(inspect.getsource(part) for part in (Classifier, scaled, shifted, train))
    constants = (TRAINED_ON, EPOCHS, BATCH, RATE, SHIFT, SEED, checksum(data))
    return hashlib.sha256(f"{constants} {code}".encode()).hexdigest()[:12]


def trained(path: Path, pixels: torch.Tensor, labels: torch.Tensor) -> Classifier:
    """Return the classifier of this recipe and data from the cache, or train and cache it."""
    if path.is_file():
        model = Classifier()
        model.load_state_dict(safetensors.torch.load_file(path))
    else:
        model = train(pixels, labels)
        with atomic_write(path) as temporary:
            safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
    return model.eval()


@torch.no_grad()
def judged(model: Classifier, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (features float64 [N, 64], class probabilities [N, 10])."""
    lots = [model(scaled(lot)) for lot in pixels.split(500)]
    return torch.cat([f for f, _ in lots]).double(), torch.cat([o for _, o in lots]).softmax(1)


# ------------------------------------------------------------------------------------------------ figures


def floor(features: torch.Tensor, n: int, test: Statistics) -> list[float]:
    """Return the distance of n real images to the test images, for each of DRAWS draws without replacement."""
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.randperm(len(features), generator=generator)[:n] for _ in range(DRAWS)]
    return [frechet(statistics([features[draw]]), test) for draw in draws]


def certainty(probabilities: torch.Tensor) -> tuple[float, list[float]]:
    """Return (share with confidence over CONFIDENT, share of each class)."""
    confidence, classes = probabilities.max(1)
    counts = torch.bincount(classes, minlength=10).double() / len(classes)
    return float((confidence > CONFIDENT).double().mean()), counts.tolist()


def span(shares: Sequence[float]) -> str:
    return f"{min(shares):.1%} .. {max(shares):.1%}"


# ------------------------------------------------------------------------------------------------ samples


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sampled(settings: argparse.Namespace, weights: str) -> np.ndarray:
    """Return the first n images of the seed's sequence, float32 [n, 1, 32, 32], cached ones from the cache."""
    path = settings.cache / f"samples-{weights[:12]}-seed{settings.seed}-{settings.dtype}.npy"
    done = np.load(path) if path.is_file() else np.empty((0, 1, 32, 32), np.float32)
    model = fastddpm.UNet.from_pretrained(settings.model).to(settings.device)
    if model.shape != (1, 32, 32):
        sys.exit(f"MODEL: it draws {model.shape}; expected digits, (1, 32, 32)")
    with tqdm(total=settings.n, initial=min(len(done), settings.n), desc="samples", unit="image", disable=None) as bar:
        while len(done) < settings.n:
            count = min(LOT, settings.n - len(done))
            images = fastddpm.sample(
                model,
                count,
                first=len(done),
                seed=settings.seed,
                batch_size=settings.batch_size,
                dtype=getattr(torch, settings.dtype),
                progress=False,
            )
            done = np.concatenate((done, images.cpu().numpy()))
            with atomic_write(path) as temporary:
                np.save(temporary, done)
            bar.update(count)
    return done[: settings.n]


def parse() -> argparse.Namespace:
    parser = arguments("Judge the samples of a digits model with a classifier trained on MNIST.", timed=False)
    parser.add_argument("model", metavar="MODEL", help="a bundled model's name, a folder, or a .npy of samples")
    parser.add_argument("--data", type=Path, required=True, help="MNIST as .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the classifier and the samples")
    parser.add_argument("--n", type=int, default=1000, help="number of samples to judge")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--batch-size", type=int, default=LOT, help="images per forward pass")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of the network")
    parser.add_argument("--device", default="cpu", help="where to sample")
    parser.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    parser.add_argument("--train-only", action="store_true", help="train and judge the classifier, then stop")
    settings = parser.parse_args()
    check_outputs(settings)
    if settings.n < 2:
        sys.exit(f"--n: got {settings.n}; expected at least 2")
    check_inputs(settings)
    return settings


def main() -> None:
    settings = parse()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with np.load(settings.data) as arrays:
        x_train, y_train, x_test, y_test = (
            torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")
        )
    held_out, y_held_out = x_train[TRAINED_ON:], y_train[TRAINED_ON:]

    path = settings.cache / f"classifier-{recipe(settings.data)}.safetensors"
    classifier = trained(path, x_train[:TRAINED_ON], y_train[:TRAINED_ON].long())
    test_features, test_probabilities = judged(classifier, x_test)
    held_features, held_probabilities = judged(classifier, held_out)
    accuracy = float((test_probabilities.argmax(1) == y_test).double().mean())
    held_accuracy = float((held_probabilities.argmax(1) == y_held_out).double().mean())
    print(f"classifier: {accuracy:.2%} right on the test images, {held_accuracy:.2%} on the held-out training images")
    if settings.train_only:
        return

    source = Path(settings.model)
    if source.suffix == ".npy":
        weights, samples = checksum(source), np.load(source)[: settings.n]
    else:
        weights = checksum(fastddpm_folder.find_folder(settings.model) / fastddpm_folder.WEIGHTS)
        samples = sampled(settings, weights)
    if samples.shape != (settings.n, 1, 32, 32):
        sys.exit(f"MODEL: the samples have shape {list(samples.shape)}; expected {[settings.n, 1, 32, 32]}")
    features, probabilities = judged(classifier, fastddpm.to_uint8(torch.from_numpy(samples)))
    confident, shares = certainty(probabilities)
    real_confident, real_shares = certainty(held_probabilities)
    test = statistics([test_features])
    distance = frechet(statistics([features]), test)
    floors = floor(held_features, settings.n, test)
    mean_floor = sum(floors) / DRAWS

    bars = {
        "classifier_accuracy": accuracy >= LEAST_ACCURACY,
        "confident": confident >= LEAST_CONFIDENT,
        "class_shares": CLASS_SHARE[0] <= min(shares) and max(shares) <= CLASS_SHARE[1],
        "frechet": distance <= MOST_TIMES_FLOOR * mean_floor,
    }
    rows = {
        "classifier_accuracy": ["right on the test images", "", f"{accuracy:.2%}", f">= {LEAST_ACCURACY:.0%}"],
        "confident": [
            f"confidence over {CONFIDENT}",
            f"{confident:.1%}",
            f"{real_confident:.1%}",
            f">= {LEAST_CONFIDENT:.0%}",
        ],
        "class_shares": ["shares of the classes", span(shares), span(real_shares), span(CLASS_SHARE)],
        "frechet": [
            "Frechet distance to test",
            f"{distance:.4g}",
            f"{mean_floor:.4g}",
            f"<= {MOST_TIMES_FLOOR * mean_floor:.4g}",
        ],
    }
    print_table(
        ["", "samples", "real images", "bar", ""],
        [[*cells, "pass" if bars[name] else "FAIL"] for name, cells in rows.items()],
    )
    print(f"the distance is {distance / mean_floor:.2f} times the floor ({min(floors):.4g} .. {max(floors):.4g})")
    if settings.json is not None:
        write_json(
            settings.json,
            {
                "benchmark": "digits_quality",
                **provenance(settings),
                "weights_or_samples_sha256": weights,
                "data_sha256": checksum(settings.data),
                "classifier": {"test_accuracy": accuracy, "held_out_accuracy": held_accuracy},
                "samples": {"n": settings.n, "confident": confident, "class_shares": shares, "frechet": distance},
                "real": {"confident": real_confident, "class_shares": real_shares, "frechet": floors},
                "times_floor": distance / mean_floor,
                "passed": bars,
            },
        )
    sys.exit(0 if all(bars.values()) else 1)


if __name__ == "__main__":
    main()
