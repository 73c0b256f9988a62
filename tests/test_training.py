"""The objective, the recipe, and resumed runs, which are identical to uninterrupted ones."""

import csv
import dataclasses
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, cli, data, ops
from fastddpm.errors import TrainingError
from fastddpm.models.config import OLD_NAMES
from fastddpm.ops.philox_normal import philox_words_ref
from fastddpm.ops.rng import Stream
from fastddpm.training import trainer as training
from fastddpm.training.loss import draw_timesteps
from fastddpm.training.recipe import Recipe
from fastddpm.training.trainer import SeededBatchSampler, Trainer

TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_groups=4,
    dropout=0.1,
)
SHORT = Recipe(
    steps=6,
    batch_size=4,
    accumulate=2,
    lr=1e-3,
    warmup=3,
    ema=0.9,
    flips=True,
    log_every=1,
    save_every=2,
    sample_every=0,
)


def images(n=10):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return data.ArrayImages(pixels, None, "noise")


def trainer(out, recipe=SHORT, dataset=None, config=TINY, **trained_for):
    dataset = images() if dataset is None else dataset
    return Trainer(dataset, out, config, recipe, torch.device("cpu"), **trained_for)


def log(out):
    with (out / "log.csv").open() as file:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def test_a_dtype_without_products_is_said(tmp_path, float32_alone):
    with pytest.warns(UserWarning, match=r"no products of torch.bfloat16, so training is many times slower"):
        trainer(tmp_path, dataclasses.replace(SHORT, dtype="bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "mean"])
def test_training_loss_is_equation_14(prediction):
    schedule, x0 = Schedule.linear(50, 1e-3, 0.1), torch.rand(6, 2, 4, 4) * 2 - 1
    t = draw_timesteps(6, 50, seed=3, first=100)
    eps = ops.philox_normal(x0.shape, seed=3, t=t, stream=Stream.FORWARD, first=100)
    bar = schedule.alphas_cumprod[t][:, None, None, None]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    one, two = (c[t][:, None, None, None] for c in (schedule.posterior_mean_coef1, schedule.posterior_mean_coef2))
    wanted = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * x0,
        "mean": one * x0 + two * x_t,
    }[prediction]

    def model(x, steps):
        assert torch.equal(steps, t)
        torch.testing.assert_close(x.double(), x_t, rtol=0, atol=1e-5)
        return 0.5 * x

    loss = fastddpm.training_loss(model, x0, schedule=schedule, prediction=prediction, seed=3, first=100)
    assert float(loss) == pytest.approx(float((0.5 * x_t - wanted).square().mean()), rel=1e-5)


def test_timesteps_are_uniform_and_follow_the_contract():
    t = draw_timesteps(100_000, 10, seed=1)
    counts = torch.bincount(t, minlength=10)
    assert counts.numel() == 10 and (counts - 10_000).abs().max() < 5 * 9000**0.5
    sample = 2**40 + 3  # w0 of counter (0, 0, sample low, sample high ^ 3 << 24), times T, over 2^32
    word = philox_words_ref((0, 0, sample & 0xFFFFFFFF, (sample >> 32) ^ (3 << 24)), 7)[0]
    assert int(draw_timesteps(1, 1000, seed=7, first=sample)) == int(word) * 1000 >> 32


def test_a_loss_of_ones_own():
    """training_loss works in a plain loop with given t and noise, and all parameters that affect the output have gradients."""
    model, x0 = UNet(TINY), torch.rand(2, 1, 8, 8)
    loss = fastddpm.training_loss(model, x0, t=torch.tensor([0, 999]), noise=torch.randn_like(x0))
    assert loss.dtype == torch.float32 and loss.dim() == 0
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(0)
    first = fastddpm.training_loss(model.eval(), x0)
    torch.manual_seed(0)
    assert torch.equal(first, fastddpm.training_loss(model, x0))


def test_draws_are_permutations_and_can_start_anywhere():
    stream = iter(SeededBatchSampler(10, 4, seed=2, start=0))
    flat = [i for _ in range(10) for i in next(stream)]
    for epoch in range(4):
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    later = iter(SeededBatchSampler(10, 4, seed=2, start=12))
    assert [i for _ in range(7) for i in next(later)] == flat[12:]


@pytest.mark.parametrize(
    ("changes", "trained_for"),
    [
        ({"dtype": "float32"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"objective": "bound"}, {"prediction": "mean", "variance": "fixed_small"}),
        ({"objective": "bound", "dtype": "bfloat16"}, {"prediction": "sample"}),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, changes, trained_for):
    recipe = dataclasses.replace(SHORT, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    one = trainer(whole, recipe, **trained_for)
    assert one.run(progress=False)
    assert trainer(broken, dataclasses.replace(recipe, steps=3), **trained_for).run(progress=False)
    two = Trainer.resume(images(), broken, torch.device("cpu"), steps=6)
    assert two.step == 3 and two.run(progress=False)
    assert log(whole) == log(broken) and len(log(whole)) == 6
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name
        assert torch.equal(one.ema[name], two.ema[name]), name
    drawn = UNet.from_pretrained(broken)  # a run's folder is a model's folder
    assert all(torch.equal(v, two.ema[k]) for k, v in drawn.state_dict().items())


def test_a_run_begun_before_there_was_a_choice_goes_on(tmp_path):
    """A run of an earlier version: its checkpoint has old option names, and no prediction, variance or objective."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    trainer(whole).run(progress=False)
    trainer(old, dataclasses.replace(SHORT, steps=3)).run(progress=False)
    saved = torch.load(old / "checkpoint.pt", weights_only=True)
    del saved["prediction"], saved["variance"], saved["recipe"]["objective"]
    old_names = {new: old for old, new in OLD_NAMES.items()}
    saved["unet"] = {old_names.get(name, name): value for name, value in saved["unet"].items()}
    assert {"multipliers", "classes", "pad"} < saved["unet"].keys()
    torch.save(saved, old / "checkpoint.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        resumed = Trainer.resume(images(), old, torch.device("cpu"), steps=6)
    assert resumed.run(progress=False) and log(whole) == log(old)
    assert (resumed.model.prediction, resumed.model.variance) == ("epsilon", "fixed_large")


@pytest.mark.parametrize(
    ("objective", "variance"), [("simple", "fixed_small"), ("bound", "fixed_large"), ("bound", "fixed_small")]
)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "mean"])
def test_every_choice_trains_and_samples(tmp_path, prediction, objective, variance):
    """The first loss of a run is that of its objective, and the saved model draws with its settings."""
    config, choices = dataclasses.replace(TINY, dropout=0.0), {"prediction": prediction, "variance": variance}
    recipe = dataclasses.replace(SHORT, objective=objective, steps=4, accumulate=1, flips=False)
    run = trainer(tmp_path, recipe, config=config, **choices)
    x0, _, _ = next(run.batches())
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        first = fastddpm.training_loss(UNet(config), x0, objective=objective, seed=recipe.seed, **choices)
    assert run.run(progress=False)
    assert float(log(tmp_path)[0][1]) == pytest.approx(float(first), rel=1e-5)

    saved, few = UNet.from_pretrained(tmp_path), Schedule.linear(20, 1e-3, 0.3)
    assert (saved.prediction, saved.variance) == (prediction, variance)
    drawn = fastddpm.sample(run.averaged(), 2, seed=0, schedule=few)
    assert drawn.isfinite().all()
    plain = UNet(config).eval()
    plain.load_state_dict(run.ema)
    assert torch.equal(drawn, fastddpm.sample(saved, 2, seed=0, schedule=few))
    assert torch.equal(drawn, fastddpm.sample(plain, 2, seed=0, schedule=few, **choices))


def test_the_command_line_chooses_and_a_resumed_run_keeps_the_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", images().pixels.numpy()[:, 0])

    def fastddpm_train(*options):
        line = ["fastddpm", "train", "--data", "x.npy", "--out", "run", *options]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    choices = ("--prediction", "mean", "--objective", "bound", "--variance", "fixed_small")
    for option, value in (("--prediction", "score"), ("--objective", "L"), ("--variance", "none")):
        code, err = fastddpm_train(option, value)
        assert code == 2 and f"Invalid value for '{option}': '{value}'" in err and "Traceback" not in err
    length = ("--steps", "2", "--batch-size", "2", "--sample-every", "0")
    assert fastddpm_train(*choices, *length)[0] == 0
    for i in range(0, 6, 2):
        code, err = fastddpm_train("--resume", *choices[i : i + 2])
        assert code == 1 and f"{choices[i][2:]}: a resumed run uses its own recipe" in err and err.count("\n") == 1
    assert fastddpm_train("--resume", "--steps", "3")[0] == 0
    saved, drawn = torch.load("run/checkpoint.pt", weights_only=True), UNet.from_pretrained("run")
    assert (saved["step"], saved["recipe"]["objective"]) == (3, "bound")
    assert (drawn.prediction, drawn.variance) == ("mean", "fixed_small")


@pytest.mark.parametrize("how", ["ctrl-c", "stop"])
def test_ctrl_c_and_stop_save_and_the_run_goes_on(tmp_path, how):
    class Interrupting(data.ArrayImages):
        seen = 0

        def __getitem__(self, i):
            Interrupting.seen += 1
            if Interrupting.seen == 10:  # in the third step
                if how == "stop":
                    stopped.stop()
                else:
                    signal.raise_signal(signal.SIGINT)
            return super().__getitem__(i)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer(whole).run(progress=False)
    plain = images()
    stopped = trainer(broken, dataset=Interrupting(plain.pixels.numpy(), None, "noise"))
    handler = signal.getsignal(signal.SIGINT)
    assert not stopped.run(progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert 0 < stopped.step < 6
    resumed = Trainer.resume(plain, broken, torch.device("cpu"))
    assert resumed.step == stopped.step and resumed.run(progress=False)
    assert log(whole) == log(broken)


def test_a_loss_that_is_not_finite_stops_and_loses_nothing(tmp_path):
    x = torch.rand(10, 1, 8, 8)
    x[9] = float("nan")
    run = trainer(tmp_path, dataclasses.replace(SHORT, steps=50, save_every=1, flips=False), TensorDataset(x))
    with pytest.raises(TrainingError, match=r"step \d: loss nan"):
        run.run(progress=False)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == run.step
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_recipe_is_followed(tmp_path):
    recipe = dataclasses.replace(SHORT, ema=0.9995, ema_warmup=True, accumulate=1)
    run = trainer(tmp_path, recipe)
    start = {k: v.clone() for k, v in run.model.state_dict().items()}
    batches, rates = run.batches(), []
    for step in range(3):
        before = {k: v.clone() for k, v in run.ema.items()}
        run._optimizer_step(batches)
        rates.append(run.optimizer.param_groups[0]["lr"])
        decay = (1 + step) / (10 + step)
        for k, v in run.model.state_dict().items():
            torch.testing.assert_close(run.ema[k], decay * before[k] + (1 - decay) * v)
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    cooling = trainer(tmp_path, dataclasses.replace(recipe, warmup=0, cooldown=4))
    batches, rates = cooling.batches(), []
    for _ in range(6):
        cooling._optimizer_step(batches)
        rates.append(cooling.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    # Adam's first step moves every parameter by at most lr, whatever the gradient: the first rate was lr / 3.
    again = trainer(tmp_path / "again", recipe)
    again._optimizer_step(again.batches())
    for k, v in again.model.state_dict().items():
        assert (v - start[k]).abs().max() <= 1e-3 / 3 * 1.001


def test_accumulated_parts_are_the_same_step(tmp_path):
    config = dataclasses.replace(TINY, dropout=0.0)
    losses = []
    for accumulate in (1, 2):
        run = trainer(tmp_path, dataclasses.replace(SHORT, accumulate=accumulate), config=config)
        losses.append([run._optimizer_step(b) for b in [run.batches()] for _ in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_gradients_are_clipped(tmp_path):
    run = trainer(tmp_path, dataclasses.replace(SHORT, grad_clip=1e-3))
    _, norm = run._optimizer_step(run.batches())
    assert norm > 1e-3  # what is logged is the norm before clipping
    state = run.optimizer.state
    squared = sum((state[p]["exp_avg"] / 0.1).square().sum() for p in run.model.parameters())
    assert float(squared.sqrt()) == pytest.approx(1e-3, rel=1e-3)


def test_flips_mirror_about_half(tmp_path):
    pixels = np.tile(np.arange(8, dtype=np.uint8) * 30, (64, 1, 8, 1))
    dataset = data.ArrayImages(pixels, None, "ramps")
    run = trainer(tmp_path, dataclasses.replace(SHORT, batch_size=64, accumulate=1), dataset)
    x0, labels, first = next(run.batches())
    rising = x0[:, 0, 0, 7] > x0[:, 0, 0, 0]
    assert 16 < rising.sum() < 48 and labels is None and first == 0
    expected = pixels / 127.5 - 1
    np.testing.assert_allclose(torch.where(rising[:, None, None, None], x0, x0.flip(-1)).numpy(), expected, atol=1e-6)


def test_learns(tmp_path):
    """After a few dozen steps on one image, the loss is far below 1, the loss of predicting 0."""
    pixels = np.repeat(np.random.default_rng(0).integers(0, 2, (1, 1, 8, 8), dtype=np.uint8) * 255, 4, 0)
    recipe = dataclasses.replace(SHORT, steps=80, batch_size=8, accumulate=1, lr=2e-3, flips=False, log_every=50)
    run = trainer(tmp_path, recipe, data.ArrayImages(pixels, None, "one"), dataclasses.replace(TINY, dropout=0.0))
    run.run(progress=False)
    assert float(log(tmp_path)[-1][1]) < 0.5


def test_any_dataset_and_labels(tmp_path):
    dataset = TensorDataset(torch.rand(10, 1, 8, 8), torch.arange(10) % 3)
    config = dataclasses.replace(TINY, num_classes=3)
    run = trainer(tmp_path, SHORT, dataset, config)
    _, labels, _ = next(run.batches())
    assert labels.dtype == torch.int64 and labels.shape == (2,)
    assert run.run(progress=False)
    trainer(tmp_path / "unlabelled", SHORT, dataset).run(progress=False)  # labels are left out


def picture_folder(folder, n=10, size=8):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images(n).pixels[:, 0].numpy()):
        Image.fromarray(np.resize(pixels, (size, size))).save(folder / f"{i:02}.png")
    return folder


def test_pictures_train_as_an_array_does(tmp_path):
    """Worker processes decode the pictures in the same order."""
    pictures = data.load(picture_folder(tmp_path / "pictures"))
    runs = [trainer(tmp_path / name, dataset=dataset) for name, dataset in (("a", pictures), ("b", images()))]
    for run in runs:
        run.run()
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_a_picture_that_is_damaged_meanwhile_loses_nothing(tmp_path):
    folder = picture_folder(tmp_path / "pictures")
    run = trainer(tmp_path / "run", dataset=data.load(folder))
    for file in folder.iterdir():
        file.write_bytes(b"nonsense")
    with pytest.raises(
        data.DataError, match=r"^data: /.*png: not a readable picture \(.*\) \(the run is saved at step 0\)$"
    ):
        run.run()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 0


def test_a_run_goes_on_with_what_it_began_with(tmp_path):
    folder = picture_folder(tmp_path / "pictures")
    trainer(tmp_path / "run", dataset=data.load(folder)).run()
    moved = folder.rename(tmp_path / "moved")
    Trainer.resume(data.load(moved), tmp_path / "run", torch.device("cpu"))
    Image.new("L", (8, 8)).save(moved / "03.png")
    with pytest.raises(TrainingError, match="data: got .* as many as at the start of the run in .* differ"):
        Trainer.resume(data.load(moved), tmp_path / "run", torch.device("cpu"))
    with_labels = data.ArrayImages(images().pixels.numpy(), np.arange(10) % 2, "noise")
    trainer(tmp_path / "two", dataset=with_labels, config=dataclasses.replace(TINY, num_classes=2)).run()
    other = data.ArrayImages(images().pixels.numpy(), np.arange(10) % 2 == 0, "noise")
    more = data.ArrayImages(images().pixels.numpy(), np.arange(10) % 3, "noise", class_names=["a", "b", "c"])
    for dataset in (other, more):
        with pytest.raises(TrainingError, match="data: got .* labels or reading options differ"):
            Trainer.resume(dataset, tmp_path / "two", torch.device("cpu"))


@pytest.mark.parametrize(("content", "says"), [
    (b"step,loss\n1,2\n", "row 1 does not have the columns step, images"), (b"\xff\xfe\x00", "can't decode"),
    (b"step,images,loss,grad_norm,lr,images_per_second,seconds\none,2,3,4,5,6,7\n", "invalid literal"),
    (b"step,images,loss,grad_norm,lr,images_per_second,seconds\n1,2\n", "row 1 does not have"),
])  # fmt: skip
def test_a_damaged_log_is_told_of(tmp_path, content, says):
    trainer(tmp_path).run()
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(TrainingError, match=rf"log.csv is damaged \(.*{says}.*\); move it away"):
        Trainer.resume(images(), tmp_path, torch.device("cpu"))
    (tmp_path / "log.csv").unlink()
    assert Trainer.resume(images(), tmp_path, torch.device("cpu")).log == []


@pytest.mark.parametrize(("classes", "rows"), [(3, 3), (25, 10)])
def test_grids_show_classes_in_rows(tmp_path, monkeypatch, classes, rows):
    dataset = data.ArrayImages(images(classes).pixels.numpy(), np.arange(classes), "noise")
    run = trainer(tmp_path, dataset=dataset, config=dataclasses.replace(TINY, num_classes=classes))
    asked = []

    def drawn(model, n, **options):
        asked.append(options["class_labels"].reshape(rows, 4))
        return torch.zeros(n, *model.shape)

    monkeypatch.setattr(training, "sample", drawn)
    run.draw_grid(None)
    (labels,) = asked
    assert (labels == labels[:, :1]).all() and labels[0, 0] == 0 and labels[-1, 0] == classes - 1
    with Image.open(tmp_path / "samples" / "0000000.png") as grid:
        assert grid.width * (10 * rows + 2) == grid.height * 42


def test_bytes_are_not_trained_on(tmp_path):
    """Floats in 0..255, as a user's own loop may get from a decoder, are refused."""
    with pytest.raises(
        ValueError, match=r"x0: values from 0 to 255; expected images in \[-1, 1\]: write x / 127.5 - 1"
    ):
        fastddpm.training_loss(UNet(TINY), torch.linspace(0, 255, 64).reshape(1, 1, 8, 8))
    dataset = TensorDataset(torch.linspace(0, 255, 640).reshape(10, 1, 8, 8))
    with pytest.raises(ValueError, match="data: image 0: values from 0 to"):
        trainer(tmp_path, dataset=dataset)
    fastddpm.training_loss(UNet(TINY), torch.randn(1, 1, 8, 8) * 9)  # standardised values are not bytes


def test_arguments_of_a_loss_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"x0: got shape \[0, 1, 8, 8\], no images"):
        fastddpm.training_loss(UNet(TINY), torch.zeros(0, 1, 8, 8))
    model = UNet(dataclasses.replace(TINY, num_classes=3))
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(
            ValueError, match=f"class_labels: got values from {min(labels)} to {max(labels)}; expected 0..2"
        ):
            fastddpm.training_loss(model, torch.zeros(2, 1, 8, 8), class_labels=labels)


def test_a_dataset_of_numpy_arrays(tmp_path):
    class Arrays(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return np.zeros((1, 8, 8), np.float32)

    trainer(tmp_path, dataset=Arrays()).run()


def test_an_iterable_dataset_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1, 8, 8)

    with pytest.raises(TrainingError, match="data: Stream is an IterableDataset; expected a map-style Dataset"):
        trainer(tmp_path, dataset=Stream())


def test_a_cooldown_longer_than_the_run_is_reported(tmp_path):
    with pytest.warns(UserWarning, match="cooldown: .* over 20 steps, and the run has 5, .* never exceeds 25% of lr"):
        trainer(tmp_path, dataclasses.replace(SHORT, steps=5, epochs=None, cooldown=20))


def test_network_for_other_images():
    def shape_for(height, width, channels, preset):
        dataset = TensorDataset(torch.zeros(1, channels, height, width))
        return training.network_for(preset, dataset)

    assert shape_for(28, 28, 1, "digits") == dataclasses.replace(UNet.from_preset("digits").config)
    assert shape_for(32, 32, 3, "cifar10") == UNet.from_preset("cifar10").config
    wide = shape_for(50, 64, 3, "cifar10")
    assert (wide.sample_size, wide.attention_resolutions, wide.in_channels) == (64, (32,), 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"accumulate": 3}, "accumulate: got 3; batch_size 4"),
        ({"epochs": 2}, "steps, epochs: got 6 and 2"),
        ({"steps": None}, "steps, epochs: got None and None"),
        ({"steps": -1}, "steps, epochs: got -1"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"dtype": "float8"}, "dtype: got 'float8'"),
        ({"objective": "L"}, "objective: got 'L'; expected one of simple, bound"),
    ],
)
def test_bad_recipe(change, says):
    with pytest.raises(TrainingError, match=says):
        dataclasses.replace(SHORT, **change)


def test_bad_runs(tmp_path):
    with pytest.raises(TrainingError, match="nothing to resume"):
        Trainer.resume(images(), tmp_path, torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"data: got images of shape \[3, 8, 8\]; expected \[1, 8, 8\]"):
        trainer(tmp_path, dataset=TensorDataset(torch.zeros(1, 3, 8, 8)))
    with pytest.raises(TrainingError, match="empty"):
        trainer(tmp_path, dataset=TensorDataset(torch.zeros(0, 1, 8, 8)))
    with pytest.raises(
        TrainingError, match="prediction: got 'score'; expected one of epsilon, sample, v_prediction, mean"
    ):
        trainer(tmp_path, prediction="score")
    with pytest.raises(TrainingError, match="variance: got 'none'; expected one of fixed_large, fixed_small"):
        trainer(tmp_path, variance="none")
    trainer(tmp_path, dataclasses.replace(SHORT, steps=1)).run(progress=False)
    with pytest.raises(TrainingError, match="data: got 11 images; expected 10"):
        Trainer.resume(images(11), tmp_path, torch.device("cpu"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="not a complete training checkpoint"):
        Trainer.resume(images(), tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="prediction: got 'x'"):
        fastddpm.training_loss(UNet(TINY), torch.zeros(1, 1, 8, 8), prediction="x")
    with pytest.raises(ValueError, match="x0: got"):
        fastddpm.training_loss(UNet(TINY), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
