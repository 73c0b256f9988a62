"""Picture files as 8-bit images: values, metadata and damaged files."""

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastddpm import pictures
from fastddpm.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 30).astype(np.uint16).reshape(6, 5)


def read(path):
    return np.asarray(pictures.read(path)[0])


def pgm(path, values, maximum, plain=False):
    height, width = values.shape
    header = f"{'P2' if plain else 'P5'}\n{width} {height}\n{maximum}\n".encode()
    body = " ".join(map(str, values.flat)).encode() if plain else values.astype(">u2").tobytes()
    path.write_bytes(header + body)


def tiff(path, values, more):
    """Write a TIFF of a kind that Pillow only reads: unsigned integers [H, W] or [H, W, 3]. more: additional tags."""
    height, width, *colours = values.shape
    samples = colours[0] if colours else 1
    tags = {
        256: width,
        257: height,
        258: (8 * values.itemsize,) * samples,
        259: 1,
        262: 2 if colours else 1,
        273: 8,
        277: samples,
    }
    tags |= {278: height, 279: values.nbytes, **more}
    extra_at, entries, extra = 8 + values.nbytes + 2 + 12 * len(tags) + 4, [], b""
    for tag, value in sorted(tags.items()):
        if isinstance(value, tuple) and len(value) > 2:
            entries.append(struct.pack("<HHII", tag, 3, len(value), extra_at + len(extra)))
            extra += struct.pack(f"<{len(value)}H", *value)
        else:
            entries.append(struct.pack("<HHII", tag, 4, 1, value[0] if isinstance(value, tuple) else value))
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + struct.pack("<H", len(entries))
    path.write_bytes(head + b"".join(entries) + b"\0\0\0\0" + extra)


# ------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_16_bits_are_scaled_by_their_full_range(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).save(path, **({"irreversible": False} if suffix == "jp2" else {}))
    np.testing.assert_allclose(read(path), RAMP / 65535 * 255, atol=0.5001)


def test_a_smaller_maximum_that_the_file_states_is_the_range(tmp_path):
    twelve = RAMP >> 4
    pgm(tmp_path / "a.pgm", twelve, 4095)
    pgm(tmp_path / "b.pgm", twelve, 4095, plain=True)
    Image.fromarray(twelve).save(tmp_path / "c.tiff", tiffinfo={pictures.MAXIMUM: 4095})
    for name in ("a.pgm", "b.pgm", "c.tiff"):
        np.testing.assert_allclose(read(tmp_path / name), twelve / 4095 * 255, atol=0.51)


def test_32_bit_integers(tmp_path):
    values = np.linspace(0, 2**31 - 1, 30).astype(np.int32).reshape(6, 5)
    Image.fromarray(values).save(tmp_path / "signed.tiff")
    np.testing.assert_allclose(read(tmp_path / "signed.tiff"), values / (2**31 - 1) * 255, atol=0.5001)
    Image.fromarray(values - 5).save(tmp_path / "negative.tiff")
    with pytest.raises(DataError, match=r"negative.tiff: integers from -5 to 2147483642; expected 0 to 2147483647"):
        pictures.read(tmp_path / "negative.tiff")
    unsigned = values.astype("<u4") * 2
    tiff(tmp_path / "unsigned.tiff", unsigned, {})
    np.testing.assert_allclose(read(tmp_path / "unsigned.tiff"), unsigned / (2**32 - 1) * 255, atol=0.5001)


def test_white_is_zero(tmp_path):
    """Pillow inverts such files only up to 8 bits."""
    tiff(tmp_path / "x.tiff", RAMP.astype("<u2"), {pictures.PHOTOMETRIC: pictures.WHITE_IS_ZERO})
    np.testing.assert_allclose(read(tmp_path / "x.tiff"), 255 - RAMP / 65535 * 255, atol=0.5001)
    tiff(tmp_path / "y.tiff", COLOUR[..., 0], {pictures.PHOTOMETRIC: pictures.WHITE_IS_ZERO})
    np.testing.assert_array_equal(read(tmp_path / "y.tiff"), 255 - COLOUR[..., 0])


def test_floats_are_in_0_to_1_or_refused(tmp_path):
    values = np.linspace(0, 1, 30, dtype=np.float32).reshape(6, 5)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    np.testing.assert_allclose(read(tmp_path / "x.tiff"), values * 255, atol=0.5001)
    for bad, says in (
        (values * 2 - 1, "floats from -1 to 1"),
        (values * 255, "from 0 to 255"),
        (values + np.nan, "nan"),
    ):
        Image.fromarray(bad.astype(np.float32)).save(tmp_path / "bad.tiff")
        with pytest.raises(DataError, match=rf"bad.tiff: .*{says}.*expected floats in \[0, 1\]"):
            pictures.read(tmp_path / "bad.tiff")


def test_colours_whose_low_bits_pillow_drops_are_refused(tmp_path):
    """Pillow reads only the high bytes of 16-bit colours."""
    tiff(tmp_path / "x.tiff", np.full((1, 2, 3), 4095, "<u2"), {pictures.MAXIMUM: (4095, 4095, 4095)})
    with pytest.raises(DataError, match="x.tiff: RGB of 16 bits with a maximum of 4095"):
        pictures.read(tmp_path / "x.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_grey_or_rgb(tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    image.save(tmp_path / "x.tiff") if mode != "HSV" else image.convert("RGB").save(tmp_path / "x.tiff")
    got, facts = pictures.read(tmp_path / "x.tiff")
    assert got.mode == facts.mode == ("L" if mode in ("1", "L") else "RGB") and not facts.transparent
    np.testing.assert_array_equal(np.asarray(got), np.asarray(Image.open(tmp_path / "x.tiff").convert(got.mode)))


# ----------------------------------------------------------------------- orientation, transparency, several


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_the_orientation_is_applied(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOUR).save(path, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(read(path), shown)
    assert shown.shape[:2] == ((6, 5) if orientation < 5 else (5, 6))
    if suffix != "jpg":
        Image.fromarray(RAMP).save(path, exif=exif) if suffix != "webp" else None
        shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        assert read(path).shape[:2] == shown.shape[:2]


def test_transparency_is_composed_on_black(tmp_path):
    alpha = RNG.integers(0, 256, (6, 5, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate((COLOUR, alpha), 2)).save(tmp_path / "rgba.png")
    image, facts = pictures.read(tmp_path / "rgba.png")
    assert facts.transparent and facts.mode == "RGBA"
    np.testing.assert_allclose(np.asarray(pictures.composed_on_black(image)), COLOUR * (alpha / 255), atol=1)
    grey = np.dstack((COLOUR[..., 0], alpha[..., 0]))
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    image, facts = pictures.read(tmp_path / "la.png")
    assert facts.transparent and facts.mode == "LA" and pictures.composed_on_black(image).mode == "L"
    np.testing.assert_allclose(
        np.asarray(pictures.composed_on_black(image)), grey[..., 0] * (alpha[..., 0] / 255), atol=1
    )
    opaque = np.concatenate((COLOUR, np.full_like(alpha, 255)), 2)
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    assert not pictures.read(tmp_path / "opaque.png")[1].transparent


def test_a_transparent_colour_is_transparency(tmp_path):
    palette = Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5) % 4, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "p.png", transparency=2)
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(6, 5) % 4).save(tmp_path / "l.png", transparency=2)
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) % 4 * 9000).save(
        tmp_path / "i.png", transparency=18000
    )
    hidden = np.arange(30).reshape(6, 5) % 4 == 2
    for name in ("p.png", "l.png", "i.png"):
        image, facts = pictures.read(tmp_path / name)
        assert facts.transparent, name
        shown = np.asarray(pictures.composed_on_black(image)).reshape(6, 5, -1)
        assert (shown[hidden] == 0).all() and (shown[~hidden].max(-1) > 0).sum() >= (6 * 5 - 8) * 2 // 3, name


def test_further_pictures_are_told_of(tmp_path):
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "x.tiff", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.tiff")
    assert [pictures.read(tmp_path / name)[1].several for name in ("x.gif", "x.tiff", "one.tiff")] == [
        True,
        True,
        False,
    ]
    np.testing.assert_array_equal(read(tmp_path / "x.tiff"), COLOUR)


# ------------------------------------------------------------------------------------ size


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24))
def test_cropped_is_the_middle(width, height, side):
    image = Image.fromarray(RNG.integers(0, 256, (height, width), dtype=np.uint8))
    got = pictures.center_cropped(image, side)
    assert got.size == (side, side)
    if width == height == side:
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


def test_cropped_is_antialiased():
    checkers = Image.fromarray((np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8))
    # Without antialiasing, pixels are 0 or 255.
    assert np.abs(np.asarray(pictures.center_cropped(checkers, 8)).astype(float) - 127.5).max() < 2
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 4:12] = 200
    assert (np.asarray(pictures.center_cropped(Image.fromarray(wide), 8)) == 200).all()


# ------------------------------------------------------------------------------------ damage

FORMATS = {
    "png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "ppm": "PPM", "tga": "TGA",
    "jp2": "JPEG2000", "pcx": "PCX", "ico": "ICO", "sgi": "SGI", "dds": "DDS", "qoi": "QOI",
}  # fmt: skip


def damaged(seed, count):
    """Yield (suffix, bytes) of files of each format with a few bytes changed or the end removed."""
    rng, image = np.random.default_rng(seed), Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for suffix, kind in FORMATS.items():
        buffer = io.BytesIO()
        image.save(buffer, kind)
        for _ in range(count):
            content = bytearray(buffer.getvalue())
            for _ in range(rng.integers(0, 6)):
                content[rng.integers(len(content))] = rng.integers(256)
            yield suffix, bytes(content[: len(content) if rng.random() < 0.5 else rng.integers(1, len(content) + 1)])


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_named(tmp_path, count):
    read = named = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix, content in damaged(count, count):
            path = tmp_path / f"x.{suffix}"
            path.write_bytes(content)
            try:
                image, facts = pictures.read(path)
                assert image.mode in pictures.MODES and image.size == (facts.width, facts.height)
                read += 1
            except DataError as error:
                assert str(error).startswith(str(path))
                named += 1
    assert min(read, named) > count  # both happen


def test_a_huge_picture_is_named(tmp_path):
    Image.fromarray(np.zeros((14000, 14000), bool)).save(tmp_path / "scan.png")
    with pytest.raises(DataError, match=r"scan.png: too large a picture \(Image size \(196000000 pixels\)"):
        pictures.read(tmp_path / "scan.png")


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    for name in ("empty.png", "none.png"):
        with pytest.raises(DataError, match=f"{name}: not a readable picture"):
            pictures.read(tmp_path / name)


def test_no_other_program_is_run(tmp_path):
    """An .eps is not passed to Ghostscript."""
    assert ".eps" not in pictures.suffixes() and {".png", ".avif", ".jfif", ".jp2", ".ppm"} <= pictures.suffixes()
    Image.fromarray(COLOUR).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(DataError, match="x.png: not a readable picture"):
        pictures.read(tmp_path / "x.png")
