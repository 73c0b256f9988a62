"""Training images from files and folders, pictures out of tensors, and files that are whole or not there."""

import numpy as np
import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import data, images
from fastddpm.data import DataError
from fastddpm.files import whole

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)


def test_npz_and_npy(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=np.arange(5), x_test=PIXELS[:1])
    np.save(tmp_path / "b.npy", PIXELS)
    np.savez(tmp_path / "c.npz", only=np.repeat(PIXELS[..., None], 3, -1))
    for name, channels in (("a.npz", 1), ("b.npy", 1), ("c.npz", 3)):
        dataset = data.load(tmp_path / name)
        assert len(dataset) == 5 and dataset[2].shape == (channels, 6, 4)
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
    np.savez(tmp_path / "d.npz", x_train=PIXELS, x_test=PIXELS / 255)
    with pytest.raises(DataError, match="got float64"):
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
    np.testing.assert_allclose(padded[0, 1:7, 2:6].numpy(), PIXELS[0] / 127.5 - 1, atol=1e-6)
    assert padded[0, 0].eq(-1).all() and padded[0, :, :2].eq(-1).all() and padded[0, 7].eq(-1).all()


def test_bad_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.load(tmp_path / "none.npz")
    with pytest.raises(DataError, match="no pictures in it"):
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
    np.savez(tmp_path / "floats.npz", x_train=PIXELS / 255)
    with pytest.raises(DataError, match=r"got float64 \[5, 6, 4\]; expected uint8"):
        data.load(tmp_path / "floats.npz")
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
    with pytest.raises(DataError, match=r"b.png: \[4, 5\], but a.png is \[4, 4\]"):
        data.load(folder)
    (folder / "b.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="b.png: not a readable picture"):
        data.load(folder)


def test_to_uint8_and_to_pil():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    assert fastddpm.to_uint8(x).tolist() == [0, 0, 128, 191, 255, 255]
    grey, colour = fastddpm.to_pil(torch.zeros(1, 1, 2, 3))[0], fastddpm.to_pil(torch.zeros(1, 3, 2, 3))[0]
    assert (grey.mode, colour.mode, grey.size) == ("L", "RGB", (3, 2))
    with pytest.raises(ValueError, match="x: got shape"):
        fastddpm.to_pil(torch.zeros(1, 2, 2, 2))


def test_grid_places_every_image():
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 4, 4)
    sheet = np.asarray(images.grid(x, scale=1))
    assert sheet.shape == (14, 20)  # 2 rows and 3 columns of 4 pixels with 2 between
    centres = [sheet[4 + 6 * (i // 3), 4 + 6 * (i % 3)] for i in range(5)]
    assert centres == fastddpm.to_uint8(x[:, 0, 0, 0]).tolist()


def test_files_are_whole_or_not_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with whole(target) as path:
        path.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
