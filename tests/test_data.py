"""Folders of images and captions: what is read, what is named and left out, and the order."""

import io
import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lorakern import data


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 12, height: int = 8) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 20, y * 30, x + y], -1).astype(np.uint8))


def test_captions_lie_beside_images(tmp_path):
    tiny.images(tmp_path, 2)
    (tmp_path / "deep").mkdir()
    gradient().save(tmp_path / "deep" / "third.JPG", "JPEG")
    (tmp_path / "deep" / "third.txt").write_text("  two\n lines \n", encoding="utf-8")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    found, bad = data.find(tmp_path)
    assert [(e.path.name, e.caption) for e in found] == [
        ("0-red.png", "a red square"),
        ("1-green.png", "a green square"),
        ("third.JPG", "two lines"),
    ]
    assert not bad


def test_metadata_names_images(tmp_path):
    gradient().save(tmp_path / "a.png")
    lines = [{"file_name": "a.png", "text": "a thing"}, {"file_name": "gone.png", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    found, bad = data.find(tmp_path)
    assert found == [data.Example(tmp_path / "a.png", "a thing")]
    assert bad == [data.Bad(tmp_path / "gone.png", "no such file")]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "x"}', '{"file_name": "a", "text": 3}'])
def test_bad_metadata_is_named_by_line(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata.jsonl line 2"):
        data.find(tmp_path, caption="x")


def test_missing_and_empty_captions_are_an_error_or_the_default(tmp_path):
    tiny.images(tmp_path, 3)
    (tmp_path / "0-red.txt").unlink()
    (tmp_path / "1-green.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 of 3 images.*0-red.png, 1-green.png"):
        data.find(tmp_path)
    assert [e.caption for e in data.find(tmp_path, "a sks")[0]] == [
        "a sks",
        "a sks",
        "a blue square",
    ]
    assert data.find(tmp_path, "")[0][0].caption == ""


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="no images in"):
        data.find(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        data.find(tmp_path / "none")
    tiny.images(tmp_path, 1)
    (tmp_path / "0-red.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"0-red.txt is not UTF-8"):
        data.find(tmp_path)


def test_every_kind_of_image_becomes_rgb():
    image = gradient()
    grey = np.asarray(image.convert("L"))
    kinds = {
        "palette": encoded(image.quantize(256)),
        "grey": encoded(image.convert("L")),
        "one bit": encoded(image.convert("1")),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "gif": encoded(image, "GIF"),
        "webp": encoded(image, "WEBP", lossless=True),
    }
    for name, raw in kinds.items():
        read = data.read_image(raw)
        assert read.mode == "RGB" and read.size == image.size, name
    # CMYK of JPEG is stored inverted by some programs; Pillow's reading must come back near
    off = np.asarray(data.read_image(kinds["cmyk"])).astype(int) - np.asarray(image)
    assert abs(off).mean() < 12
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(data.read_image(encoded(sixteen)))[..., 0], grey)


def test_transparency_goes_on_white():
    for mode in ("RGBA", "LA"):
        clear = Image.new(mode, (4, 4), 0)
        assert np.asarray(data.read_image(encoded(clear))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    assert np.asarray(data.read_image(encoded(palette, transparency=0))).min() == 255


def test_exif_turns_the_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    read = data.read_image(encoded(gradient(), "JPEG", exif=exif, quality=100))
    assert read.size == (8, 12)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"this is text", "not an image"),
        (encoded(gradient(64, 64))[:120], "cut short"),
        (encoded(gradient(64, 64), "JPEG")[:400], "cut short"),
        (encoded(gradient(64, 64))[:20], "not an image|cut short"),
    ],
)
def test_broken_images_say_why(raw, reason):
    with pytest.raises(data.BadImage, match=reason):
        data.read_image(raw)


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(data.BadImage, match="bomb"):
        data.read_image(encoded(gradient()))


@given(resolution=st.integers(1, 24).map(lambda n: 64 * n), step=st.sampled_from([8, 32, 64]))
def test_bucket_sizes_fit_the_area(resolution, step):
    sizes = data.bucket_sizes(resolution, step, square=False)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert 0.5 <= width / height <= 2
    assert data.bucket_sizes(resolution, step, square=True) == [(resolution, resolution)]


def test_resolution_that_does_not_fit_names_one_that_does():
    with pytest.raises(ValueError, match=r"resolution 500.*multiple of 64, 512"):
        data.bucket_sizes(500, 64, square=False)


def test_nearest_bucket_keeps_the_aspect():
    sizes = data.bucket_sizes(512, 64, square=False)
    assert data.nearest_bucket((1000, 1000), sizes) == (512, 512)
    wide, tall = (data.nearest_bucket(size, sizes) for size in ((1600, 900), (900, 1600)))
    assert wide == tall[::-1] and wide[0] > wide[1]
    assert data.nearest_bucket((5000, 10), sizes)[0] == max(w for w, _ in sizes)


def test_fit_covers_and_crops_the_middle():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    pixels, corner = data.fit(image, (16, 16))
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert corner == (0, 8) and pixels.min() > 0.9
    stretched, _ = data.fit(Image.new("RGB", (3, 5), "black"), (16, 16))
    assert stretched.shape == (3, 16, 16) and (stretched == -1).all()


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (16, 24)])
def test_crop_is_what_fit_scales(size):
    image = gradient(48, 30)
    cut = data.crop(image, size)
    assert abs(cut.width / cut.height - size[0] / size[1]) < 0.05
    assert cut.width == image.width or cut.height == image.height
    # the same middle, up to the pixels at the border that a resize looks beyond
    difference = (data.fit(image, size)[0] - data.fit(cut, size)[0])[:, 2:-2, 2:-2].abs()
    assert difference.max() < 0.15


@settings(max_examples=60)
@given(
    buckets=st.lists(st.sampled_from([(64, 64), (64, 128), (128, 64)]), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_order_is_a_pure_function_and_sees_everything(buckets, batch_size, seed):
    order = data.Order(buckets, batch_size, seed)
    epochs = [[order.batch(e * order.batches_per_epoch + i) for i in range(order.batches_per_epoch)]
              for e in range(3)]  # fmt: skip
    for batches in epochs:
        assert {i for batch in batches for i in batch} == set(range(len(buckets)))
        for batch in batches:
            assert len(batch) == batch_size
            assert len({buckets[i] for i in batch}) == 1
    counts = torch.bincount(torch.tensor([i for batch in epochs[0] for i in batch]))
    for members in order.members.values():
        assert counts[members].max() - counts[members].min() <= 1
    # asked in any order, and by another object
    fresh = data.Order(buckets, batch_size, seed)
    last = 3 * order.batches_per_epoch - 1
    assert fresh.batch(last) == epochs[2][-1] and fresh.batch(0) == epochs[0][0]


def test_epochs_and_seeds_differ():
    buckets = [(64, 64)] * 30
    whole = [tuple(data.Order(buckets, 30, seed).batch(e)) for seed in (0, 1) for e in (0, 1)]
    assert len(set(whole)) == 4
