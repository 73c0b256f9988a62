"""Images from files and folders, image files from tensors, and files that are complete or absent."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import data, images, pictures
from fastddpm.data import DataError
from fastddpm.utils.files import atomic_write

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 5), dtype=np.uint8)


def test_npz_and_npy(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=np.arange(5), x_test=PIXELS[:1])
    np.save(tmp_path / "b.npy", PIXELS)
    np.savez(tmp_path / "c.npz", only=np.repeat(PIXELS[..., None], 3, -1))
    for name, channels in (("a.npz", 1), ("b.npy", 1), ("c.npz", 3)):
        dataset = data.load(tmp_path / name)
        assert len(dataset) == 5 and dataset[2].shape == (channels, 6, 5)
        np.testing.assert_allclose(dataset[2][0].numpy(), PIXELS[2] / 127.5 - 1, atol=1e-6)
    image, label = data.load(tmp_path / "a.npz", labels=True)[3]
    assert int(label) == 3 and image.dtype == torch.float32


def test_the_test_images_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=PIXELS, x_test=PIXELS[:2], y_test=np.arange(2))
    assert torch.equal(data.load_test(tmp_path / "a.npz").pixels[:, 0], torch.from_numpy(PIXELS[:2]))
    assert data.load_test(tmp_path / "a.npz", labels=True).labels.tolist() == [0, 1]
    np.savez(tmp_path / "b.npz", x_train=PIXELS)
    np.save(tmp_path / "c.npy", PIXELS)
    for path in (tmp_path / "b.npz", tmp_path / "c.npy", tmp_path):
        assert data.load_test(path) is None
    np.savez(tmp_path / "d.npz", x_train=PIXELS, x_test=np.linspace(-1, 1, 60).reshape(2, 6, 5))
    with pytest.raises(DataError, match="d.npz: float64 from -1 to 1"):
        data.load_test(tmp_path / "d.npz")
    with pytest.raises(DataError, match="no such file"):
        data.load_test(tmp_path / "none.npz")


def test_folder(tmp_path):
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    dataset = data.load(tmp_path)
    assert torch.equal(fastddpm.to_uint8(torch.stack([dataset[i] for i in range(5)]))[:, 0], torch.from_numpy(PIXELS))


def test_padding_is_black_and_centred(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    padded = data.load(tmp_path / "x.npy").pad_to(8)[0]
    assert padded.shape == (1, 8, 8)
    np.testing.assert_allclose(padded[0, 1:7, 1:6].numpy(), PIXELS[0] / 127.5 - 1, atol=1e-6)
    assert (
        padded[0, 0].eq(-1).all()
        and padded[0, :, :1].eq(-1).all()
        and padded[0, :, 6:].eq(-1).all()
        and padded[0, 7].eq(-1).all()
    )


def test_bad_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.load(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no pictures in the folder"):
        data.load(tmp_path)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="not a readable"):
        data.load(tmp_path / "cut.npz")
    np.savez_compressed(tmp_path / "a.npz", x_train=np.zeros_like(PIXELS))
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[60:80] = b"\xff" * 20  # in the compressed member, so that zlib finds it and no checksum
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(DataError, match="not a readable"):
        data.load(tmp_path / "a.npz")
    np.savez(tmp_path / "names.npz", a=PIXELS, b=PIXELS)
    with pytest.raises(DataError, match="holds a, b; expected one of x_train"):
        data.load(tmp_path / "names.npz")
    np.savez(tmp_path / "labels.npz", x=PIXELS, y=np.arange(4))
    with pytest.raises(DataError, match=r"labels have shape \[4\]; expected \[5\]"):
        data.load(tmp_path / "labels.npz", labels=True)
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("L", (4, 4)).save(folder / "a.png")
    Image.new("L", (5, 4)).save(folder / "b.png")
    with pytest.raises(
        DataError, match=r"b.png: 5x4 pixels, but a.png has 4x4; pictures must have one size, or pass size"
    ):
        data.load(folder)
    (folder / "b.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="b.png: not a readable picture"):
        data.load(folder)


def said(call, *arguments, **options):
    """Return (the result of the call, its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call(*arguments, **options)
    return result, " | ".join(str(w.message) for w in caught)


# ------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize(("dtype", "scale"), [
    (np.uint16, 65535), (np.uint32, 2**32 - 1), (np.float16, 1), (np.float32, 1), (np.float64, 1), (bool, 1),
])  # fmt: skip
def test_numbers_are_scaled_to_bytes(tmp_path, dtype, scale):
    values = (np.linspace(0, 1, 300).reshape(2, 10, 15) * scale).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    images, notes = said(data.load, tmp_path / "x.npy")
    np.testing.assert_allclose(images.pixels[:, 0].numpy(), values.astype(np.float64) / scale * 255, atol=0.6)
    assert notes == ""


@pytest.mark.parametrize(("values", "says"), [
    (np.arange(60).reshape(2, 5, 6), r"int64 from 0 to 59; .*: write x.astype\(np.uint8\)"),
    (np.linspace(-1, 1, 60).reshape(2, 5, 6), r"float64 from -1 to 1; .*: write \(\(x \+ 1\) / 2\).clip\(0, 1\)"),
    (np.linspace(0, 255, 60).reshape(2, 5, 6), r"float64 from 0 to 255; .*: write x.round\(\).astype\(np.uint8\)"),
    (np.linspace(0, 1 + 2e-7, 60).reshape(2, 5, 6), r"float64 from 0 to 1.0000002; .*: write x.clip\(0, 1\)"),
    (np.arange(60).reshape(2, 5, 6) % 2, r"int64 from 0 to 1; .*: write x.astype\(bool\)"),
    (np.arange(60).reshape(2, 5, 6) - 7, r"int64 from -7 to 52; expected .*floats in \[0, 1\]$"),
    (np.full((2, 5, 6), np.nan), "float64 from nan to nan"),
    (np.zeros((2, 5, 6), complex), "complex128"),
])  # fmt: skip
def test_other_numbers_are_refused_with_the_line_that_mends_them(tmp_path, values, says):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(DataError, match=rf"x.npy: {says}"):
        data.load(tmp_path / "x.npy")


def test_wide_integers_that_are_dark_are_told_of(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 5, 6), 4095, np.uint16))
    assert "use only 6.2 % of it, so that images are dark" in said(data.load, tmp_path / "x.npy")[1]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_layouts(tmp_path, channels):
    last = np.random.default_rng(0).integers(0, 256, (10, 16, 16, channels), dtype=np.uint8)
    np.save(tmp_path / "last.npy", last)
    np.save(tmp_path / "first.npy", last.transpose(0, 3, 1, 2))
    (a, said_a), (b, said_b) = (said(data.load, tmp_path / f"{name}.npy") for name in ("last", "first"))
    assert torch.equal(a.pixels, b.pixels) and a.shape == (channels, 16, 16)
    assert said_a == "" and f"[10, {channels}, 16, 16] was read as [N, C, H, W]" in said_b


@pytest.mark.parametrize(("shape", "says"), [
    ((64, 64), r"got \[64, 64\]; .*write one image as x\[None\]"),
    ((64, 64, 3), r"got \[64, 64, 3\], which may be one colour image; .*x\[None\]"),
    ((10, 5, 32, 32), r"got \[10, 5, 32, 32\]; .*x.transpose\(0, 2, 3, 1\)"),
    ((10, 3, 4, 4), r"got \[10, 3, 4, 4\]; .*x.transpose\(0, 2, 3, 1\)"),
    ((1, 2, 3, 4, 5), r"got \[1, 2, 3, 4, 5\]; expected images"),
    ((0, 8, 8), "has no images"),
    ((3, 0, 8), "has no images"),
])  # fmt: skip
def test_layouts_that_can_be_mistaken_are_refused(tmp_path, shape, says):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=says):
        data.load(tmp_path / "x.npy")


def test_layouts_of_other_channels(tmp_path):
    for shape, read_as in (((10, 32, 32, 5), (5, 32, 32)), ((5, 16, 16, 8), (8, 16, 16)), ((5, 4, 4, 2), (2, 4, 4))):
        np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
        assert data.load(tmp_path / "x.npy").shape == read_as
    mended = np.zeros((5, 5, 16, 16), np.uint8).transpose(0, 2, 3, 1)  # as the message says
    np.save(tmp_path / "x.npy", mended)
    assert data.load(tmp_path / "x.npy").shape == (5, 16, 16)
    np.save(tmp_path / "x.npy", np.zeros((3, 32, 32), np.uint8))
    assert "read as 3 grey images" in said(data.load, tmp_path / "x.npy")[1]


def test_an_npy_stays_on_the_disk(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((10, 16, 16, 3), np.uint8))
    array = data.load(tmp_path / "x.npy")._array
    while not isinstance(array, np.memmap):
        array = array.base
    assert array.filename


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_arrays_are_resized_like_pictures(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 20, channels), dtype=np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    images, notes = said(data.load, tmp_path / "x.npy", size=6)
    assert images.shape == images[0].shape == (channels, 6, 6) and notes == ""
    for image, original in zip(images.pixels, pixels, strict=True):
        for c in range(channels):
            expected = np.asarray(pictures.center_cropped(Image.fromarray(np.ascontiguousarray(original[..., c])), 6))
            np.testing.assert_array_equal(image[c].numpy(), expected)
    assert (
        "2 of 2 images are smaller than 16 pixels; they are enlarged" in said(data.load, tmp_path / "x.npy", size=16)[1]
    )


# ------------------------------------------------------------------------------------ labels


def labelled(tmp_path, y, **options):
    np.savez(tmp_path / "x.npz", x_train=np.zeros((len(y), 5, 6), np.uint8), y_train=y)
    images, notes = said(data.load, tmp_path / "x.npz", labels=True, **options)
    return images.labels.tolist(), images.class_names, notes


def test_labels(tmp_path):
    for y in ([0, 1, 2, 1], np.array([0, 1, 2, 1], np.uint8), np.array([0.0, 1, 2, 1]), np.array([[0], [1], [2], [1]])):
        assert labelled(tmp_path, y) == ([0, 1, 2, 1], None, "")
    assert labelled(tmp_path, [False, True]) == ([0, 1], None, "")
    assert labelled(tmp_path, ["cat", "dog", "ant", "dog"]) == ([1, 2, 0, 2], ["ant", "cat", "dog"], "")
    assert labelled(tmp_path, np.array([b"cat", b"dog"])) == ([0, 1], ["cat", "dog"], "")
    got, names, notes = labelled(tmp_path, [7, 3, 7, 20])
    assert (got, names) == (
        [1, 0, 1, 2],
        ["3", "7", "20"],
    ) and "labels are 3, 7, 20: classes 0..2 in this order" in notes


def test_words_in_an_object_array_have_a_way_out(tmp_path):
    with pytest.raises(
        DataError, match=r"x.npz: not a readable .*: save words as an array of strings, x.astype\(str\)"
    ):
        labelled(tmp_path, np.array(["cat", "dog"], dtype=object))


def test_labels_of_known_classes(tmp_path):
    """The classes of a model, of which a data set may lack some."""
    assert labelled(tmp_path, [0, 2], classes=4)[:2] == ([0, 2], None)
    assert labelled(tmp_path, [7, 20], classes=["3", "7", "20"])[:2] == ([1, 2], ["3", "7", "20"])
    assert labelled(tmp_path, ["dog"], classes=["cat", "dog"])[0] == [1]
    for y, classes, says in (
        ([0, 4], 4, r"label 1 is 4; expected 0..3"), (["dog"], 4, "labels are words, such as 'dog'; expected ids in 0..3"),
        (["cow"], ["cat", "dog"], "label 'cow' is not one of the classes cat, dog"), ([9], ["3", "7"], "label '9' is not one"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            labelled(tmp_path, y, classes=classes)


@pytest.mark.parametrize(("y", "says"), [
    ([0.1, 1.0], "label 0 is 0.1"), ([0, np.nan], "label 1 is nan"), ([0, np.inf], "label 1 is inf"),
    ([0, -1, -2], "label 1 is -1"), ([0.0, -1.0], "label 1 is -1.0"),
    (np.eye(3, dtype=int), r"labels have shape \[3, 3\]; expected \[3\]: for one-hot rows, write y.argmax"),
    (np.array([2**63 + 5, 1, 2], np.uint64), "label 0 is 9223372036854775813"), ([1e300, 1, 2], "label 0 is 1e\\+300"),
    (np.array([1j, 2]), "labels are complex128"), (np.array(["2020-01-01"], "datetime64[D]"), "labels are datetime64"),
])  # fmt: skip
def test_labels_that_are_none_are_refused(tmp_path, y, says):
    with pytest.raises(DataError, match=says):
        labelled(tmp_path, y)


# ------------------------------------------------------------------------------------ folders


def picture(path, values=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full((4, 4), 100, np.uint8) if values is None else values
    Image.fromarray(values).save(path, **options)


def test_subfolders_are_classes_with_labels(tmp_path):
    for name, level in (("dog/b.png", 3), ("cat/a.png", 1), ("dog/more/a.png", 4), ("cat/z.png", 2)):
        picture(tmp_path / name, np.full((4, 4), level, np.uint8))
    images = data.load(tmp_path, labels=True)
    assert images.class_names == ["cat", "dog"] and images.labels.tolist() == [0, 0, 1, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    plain = data.load(tmp_path)
    assert plain.labels is None and torch.equal(plain.pixels, images.pixels)
    assert data.load(tmp_path, labels=True, classes=["bird", "cat", "dog"]).labels.tolist() == [1, 1, 2, 2]
    (tmp_path / "cow").mkdir()
    (tmp_path / ".git").mkdir()
    assert "subfolders without pictures are not classes: cow" in said(data.load, tmp_path, labels=True)[1]
    picture(tmp_path / "loose.png")
    with pytest.raises(
        DataError, match=r"loose.png: has no class; with labels, every picture must be in the subfolder"
    ):
        data.load(tmp_path, labels=True)


def test_what_is_no_picture_is_counted(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".hidden" / "b.png")
    picture(tmp_path / "__MACOSX" / "b.png")
    for name in ("notes.txt", "more.TXT", "table.csv", "README", ".DS_Store"):
        (tmp_path / name).touch()
    images, notes = said(data.load, tmp_path)
    assert (
        len(images) == 1
        and "omitted files that are not pictures: 2 .txt, " in notes
        and "1 .csv" in notes
        and "1 no suffix" in notes
    )
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="no pictures in the folder or its subfolders: 2 .txt"):
        data.load(tmp_path)


def test_a_link_to_a_folder_above_ends(tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path)
    assert len(data.load(tmp_path)) == 1


@pytest.mark.parametrize("suffix", ["jfif", "avif", "jp2", "ppm", "PNG", "tga", "qoi"])
def test_every_suffix_that_pillow_reads(tmp_path, suffix):
    colour = np.full((8, 8, 3), 90, np.uint8)
    picture(tmp_path / f"a.{suffix}", colour, **({"lossless": True} if suffix == "webp" else {}))
    assert (data.load(tmp_path).pixels.int() - 90).abs().max() <= 3


def test_modes_of_a_folder(tmp_path):
    picture(tmp_path / "a.png")
    assert data.load(tmp_path).shape == (1, 4, 4)
    picture(tmp_path / "b.png", np.full((4, 4, 3), 9, np.uint8))
    images, notes = said(data.load, tmp_path)
    assert images.shape == (3, 4, 4) and "1 of 2 pictures are grey; all are converted to RGB" in notes
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[0, 0, 3] = 0
    picture(tmp_path / "c.png", rgba)
    images, notes = said(data.load, tmp_path)
    assert images.shape == (3, 4, 4) and images.pixels[2, :, 0, 0].tolist() == [0, 0, 0]
    assert "1 of 3 pictures are transparent and composed on black" in notes
    images, notes = said(data.load, tmp_path, alpha="keep")
    assert images.shape == (4, 4, 4) and images.pixels[2, 3, 0, 0] == 0 and (images.pixels[:2, 3] == 255).all()
    assert "composed" not in notes


def test_alpha_that_is_not_there(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="alpha: got 'keep', but no picture"):
        data.load(tmp_path, alpha="keep")
    with pytest.raises(ValueError, match="alpha: got 'white'; expected one of black, keep"):
        data.load(tmp_path, alpha="white")
    np.save(tmp_path / "x.npy", PIXELS)
    with pytest.raises(DataError, match="alpha and skip_damaged are for folders of pictures"):
        data.load(tmp_path / "x.npy", alpha="keep")


def test_pictures_of_many_sizes_are_cropped(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(20, 30), (16, 16), (40, 17)]):
        picture(tmp_path / f"{i}.png", rng.integers(0, 256, size, dtype=np.uint8))
    images, notes = said(data.load, tmp_path, size=16)
    assert images.shape == images[2].shape == (1, 16, 16) and notes == ""
    np.testing.assert_array_equal(images.pixels[1, 0].numpy(), np.asarray(Image.open(tmp_path / "1.png")))
    assert "2 of 3 images are smaller than 18 pixels; they are enlarged" in said(data.load, tmp_path, size=18)[1]
    for size in (0, 2.5, True):
        with pytest.raises(ValueError, match="size: got"):
            data.load(tmp_path, size=size)


def test_damaged_pictures_are_named_or_left_out(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8))
    for i in (1, 3):
        path = tmp_path / f"{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(
        DataError, match=r"1.png: not a readable picture .*; so are 1 more. skip_damaged \(--skip-damaged\) omits"
    ):
        data.load(tmp_path)
    images, notes = said(data.load, tmp_path, skip_damaged=True)
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 2, 4] and "omitted 2 damaged: 1.png, 3.png" in notes
    for i in (0, 2, 4):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match="none of its 2 pictures can be read"):
        data.load(tmp_path, skip_damaged=True)


def test_further_pictures_and_doubtful_ones_are_told_of(tmp_path):
    frame = Image.fromarray(np.full((4, 4), 9, np.uint8))
    frame.save(tmp_path / "a.gif", save_all=True, append_images=[frame.rotate(90), Image.new("L", (4, 4))])
    assert "1 of 1 files have several pictures each; the first picture is used" in said(data.load, tmp_path)[1]


def test_dark_pictures_are_told_of_beside_others(tmp_path):
    picture(tmp_path / "a.png", np.full((4, 4), 1000, np.uint16))
    picture(tmp_path / "b.png")
    assert "use only 1.5 % of it, so that images are dark" in said(data.load, tmp_path)[1]


def test_many_pictures_are_read_by_worker_processes(tmp_path, monkeypatch):
    for i in range(7):
        picture(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8))
    images = data.load(tmp_path)
    alone = images.read(range(6, -1, -1))
    monkeypatch.setattr(data, "WORKER_BATCH", 3)
    assert torch.equal(images.read(range(6, -1, -1)), alone) and alone[:, 0, 0, 0].tolist() == [6, 5, 4, 3, 2, 1, 0]
    (tmp_path / "5.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="^/.*5.png: not a readable picture"):
        images.read(range(7))


def test_a_fault_that_is_over_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MANY_PICTURES", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(4):
        picture(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "4.png").symlink_to(tmp_path / "later.png")
    with pytest.raises(DataError, match="4.png: cannot be read"):
        data.load(tmp_path / "pictures")
    picture(tmp_path / "later.png")
    assert len(data.load(tmp_path / "pictures")) == 5


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_damaged_arrays_are_read_or_named(tmp_path, kind):
    rng, whole = np.random.default_rng(0), tmp_path / f"whole.{kind}"
    np.save(whole, PIXELS) if kind == "npy" else np.savez_compressed(whole, x_train=PIXELS)
    content, named = whole.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            damaged[rng.integers(128 if kind == "npy" else len(damaged))] = rng.integers(256)
        path = tmp_path / f"x.{kind}"
        path.write_bytes(damaged)
        try:
            said(data.load, path)
        except DataError as error:
            named += str(path) in str(error)
    assert named > 100


def test_a_check_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MANY_PICTURES", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    for i in range(6):
        picture(folder / f"{i}.png", np.full((4, 4), i, np.uint8))
    (folder / "5.png").write_bytes(b"nonsense")
    first, _ = said(data.load, folder, skip_damaged=True)
    assert first.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4] and len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    with monkeypatch.context() as patched:
        read, seen = pictures.read, []
        patched.setattr(pictures, "read", lambda path, content: seen.append(path.name) or read(path, content))
        again, notes = said(data.load, folder, skip_damaged=True)
    assert seen == ["5.png"]  # which may have been mended without a trace
    assert again.digest() == first.digest() and "omitted 1 damaged: 5.png" in notes
    picture(folder / "4.png", np.full((4, 4), 77, np.uint8))
    assert data.load(folder, skip_damaged=True).digest() != first.digest()
    (kept, *_) = (tmp_path / "cache").rglob("*.npz")
    kept.write_bytes(b"damaged")
    assert len(said(data.load, folder, skip_damaged=True)[0]) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # where no folder can be made
    assert len(said(data.load, folder, skip_damaged=True)[0]) == 5


def test_digests_tell_images_apart(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "b.npy", PIXELS + 1)
    a, again, b = (data.load(tmp_path / f"{name}.npy") for name in "aab")
    assert a.digest() == again.digest() and len({a.digest(), b.digest(), a.pad_to(8).digest()}) == 3
    for i, pixels in enumerate(PIXELS):
        picture(tmp_path / "one" / f"{i}.png", pixels)
        picture(tmp_path / "two" / f"{i}.png", pixels[::-1])
    one, two = (data.load(tmp_path / name) for name in ("one", "two"))
    assert len({one.digest(), two.digest(), data.load(tmp_path / "one", size=4).digest()}) == 3


@pytest.mark.parametrize("size", [(9, 9), (4, 2), (2, 4), (4, 6)])
def test_a_picture_that_changes_afterwards_is_named(tmp_path, size):
    picture(tmp_path / "a.png")
    images = data.load(tmp_path).pad_to(12)
    picture(tmp_path / "a.png", np.zeros(size, np.uint8))
    with pytest.raises(DataError, match="a.png: its size has changed from 4x4 pixels"):
        images[0]


def test_to_uint8_and_to_pil():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    assert fastddpm.to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255]
    grey, colour = fastddpm.to_pil(torch.zeros(1, 1, 2, 3))[0], fastddpm.to_pil(torch.zeros(1, 3, 2, 3))[0]
    assert (grey.mode, colour.mode, grey.size) == ("L", "RGB", (3, 2))
    assert fastddpm.to_pil(torch.zeros(1, 4, 2, 3))[0].mode == "RGBA"
    with pytest.raises(ValueError, match="x: got shape"):
        fastddpm.to_pil(torch.zeros(1, 2, 2, 2))


def test_grid_places_every_image():
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 4, 4)
    sheet = np.asarray(images.grid(x, scale=1))
    assert sheet.shape == (14, 20)  # 2 rows and 3 columns of 4 pixels with 2 between
    centres = [sheet[4 + 6 * (i // 3), 4 + 6 * (i % 3)] for i in range(5)]
    assert centres == fastddpm.to_uint8(x[:, 0, 0, 0]).tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
def test_grids_of_any_channels(channels):
    x = torch.rand(3, channels, 4, 5) * 2 - 1
    sheet = np.asarray(images.grid(x, scale=1))
    assert sheet.shape[1::-1] == images.grid_layout(3, (channels, 4, 5), scale=1).size
    pixels = fastddpm.to_uint8(x).numpy()
    if channels == 3:
        np.testing.assert_array_equal(sheet[2:6, 2:7], pixels[0].transpose(1, 2, 0))
    elif channels == 4:  # composed on black
        np.testing.assert_allclose(sheet[2:6, 2:7], (pixels[0, :3] * (pixels[0, 3:] / 255)).transpose(1, 2, 0), atol=1)
    else:  # side by side
        np.testing.assert_array_equal(sheet[2:6, 2 : 2 + 5 * channels], np.concatenate(pixels[0], 1))


def test_a_grid_that_no_file_can_hold_is_refused():
    layout = images.grid_layout(1_000_000, (1, 64, 64))
    with pytest.raises(
        ValueError, match=r"gif: x.gif would have 66002x66002 pixels; a .gif has at most 65535 per side"
    ):
        images.check_grid_size("gif", Path("x.gif"), layout)
    images.check_grid_size("output", Path("x.png"), layout)


def test_files_are_whole_or_not_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with atomic_write(target) as path:
        path.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
