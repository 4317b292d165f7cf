"""What InstantID is told of a face: the drawing of its keypoints, its embedding, its file."""

import json
import math
from pathlib import Path

import instantids as ii
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakern import data

pytest.importorskip("diffusers")

from lorakern import conditioning
from lorakern.conditioning import faces

GOLDEN = Path(__file__).with_name("instantid_keypoints.png")
SIZE = (200, 220)


@pytest.fixture(name="pipe")
def pipe_fixture(tmp_path):
    return ii.pipeline(tmp_path)


# the drawing


def test_the_drawing_is_the_golden_one():
    drawn = conditioning.draw_keypoints(ii.POINTS, SIZE)
    assert drawn.mode == "RGB" and drawn.size == SIZE
    assert np.array_equal(ii.array(drawn), ii.array(Image.open(GOLDEN)))


def test_discs_and_limbs_are_where_they_belong():
    pixels = ii.array(conditioning.draw_keypoints(ii.POINTS, SIZE))
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    free = np.ones(x.shape, bool)
    for (px, py), colour in zip(ii.POINTS, colours, strict=True):
        disc = (x - int(px)) ** 2 + (y - int(py)) ** 2 <= 10**2
        assert (pixels[disc] == colour).all()
        free &= ~disc
    nose = np.array(ii.POINTS[2])
    for point, colour in zip(ii.POINTS, colours, strict=True):
        if colour == (0, 0, 255):
            continue
        middle, (dx, dy) = np.trunc((np.array(point) + nose) / 2), np.array(point) - nose
        assert (pixels[int(middle[1]), int(middle[0])] == np.array(colour) * 0.6).all()
        half = math.hypot(dx, dy) / 2
        along = ((x - middle[0]) * dx + (y - middle[1]) * dy) / (2 * half)
        across = ((x - middle[0]) * dy - (y - middle[1]) * dx) / (2 * half)
        limb = (pixels == np.array(colour) * 0.6).all(-1)
        # a pixel and a half of leave: for rounding, and for an angle in whole degrees
        inner = (along / (half - 1.5)) ** 2 + (across / 2.5) ** 2 <= 1
        outer = (along / (half + 1.5)) ** 2 + (across / 5.5) ** 2 <= 1
        assert limb[inner & free].all() and not limb[~outer].any()
        free &= ~limb
    assert not pixels[free].any()


def test_points_outside_are_cut_off():
    whole = ii.array(conditioning.draw_keypoints(ii.POINTS, SIZE))
    points = torch.tensor(ii.POINTS, dtype=torch.float64) - torch.tensor([90, 100])
    part = ii.array(conditioning.draw_keypoints(points, (60, 70)))
    # the nose and what is right of and below it; halves are rounded towards zero, so not all
    assert (part == whole[100:170, 90:150]).all(-1).mean() > 0.98 and part.any(-1).mean() > 0.1
    away = conditioning.draw_keypoints(points + 1e6, (60, 70))
    assert not ii.array(away).any()


@pytest.mark.parametrize(
    ("points", "size", "message"),
    [
        (ii.POINTS[:4], SIZE, r"want keypoints \[5, 2\], x and y each, got \[4, 2\]"),
        (None, SIZE, "there is none"),
        ([[math.nan, 0]] * 5, SIZE, "keypoints: 5 of 10 values are not finite"),
        ("faces", SIZE, "want numbers, got a str"),
        (ii.POINTS, (0, 4), r"want a size \(width, height\) in pixels, got \(0, 4\)"),
    ],
)
def test_what_is_no_face_is_not_drawn(points, size, message):
    with pytest.raises(ValueError, match=message):
        conditioning.draw_keypoints(points, size)


@pytest.mark.parametrize("source", [(48, 30), (30, 48), (40, 40), (9, 31)])
def test_points_go_with_the_picture_into_its_bucket(source):
    for place in ((source[0] // 2, source[1] // 2), (source[0] // 2 + 1, source[1] // 2 - 2)):
        pixels = np.zeros((source[1], source[0], 3), np.uint8)
        pixels[place[1], place[0]] = 255
        found, _ = data.fit(Image.fromarray(pixels), (64, 48))
        bright = np.unravel_index(found.sum(0).argmax().item(), (48, 64))
        # the middle of the pixel: what is read off a picture is a corner or a middle
        point = faces.fit(torch.tensor(place, dtype=torch.float64) + 0.5, source, (64, 48)) - 0.5
        assert np.abs(point.numpy() - np.array(bright[::-1])).max() <= 0.75


# the embedding


def test_an_embedding_stays_as_it_is_and_several_are_averaged(pipe):
    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet))
    one, other = ii.face(1), ii.face(2)
    got = identity.embeds(one)
    assert got.shape == (2, 1, 1, 512) and not got[0].any() and torch.equal(got[1, 0, 0], one)
    assert torch.equal(identity.embeds(one.double().numpy(), guidance=False), got[1:])
    mean = identity.embeds(torch.stack([one, other]), guidance=False)
    assert torch.allclose(mean[0, 0, 0], (one + other) / 2)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(768), r"want an embedding \[512\] or \[N, 512\], got \[768\]"),
        (torch.zeros(1, 2, 512), r"got \[1, 2, 512\]"),
        (torch.zeros(0, 512), r"no face, the embeddings are \[0, 512\]"),
        (torch.full((512,), math.nan), "embedding: 512 of 512 values are not finite"),
        (torch.zeros(512, dtype=torch.complex64), "want real numbers, got torch.complex64"),
        ([], r"want an embedding \[512\] or \[N, 512\], got \[0\]"),
    ],
)
def test_what_is_no_embedding_is_refused(embeddings, message):
    with pytest.raises(ValueError, match=message):
        faces.embedding(embeddings)


def test_the_users_encoder_finds_the_face(pipe):
    pictures = []

    def encoder(picture):
        pictures.append(picture)
        return ii.face().numpy(), np.array(ii.SMALL) * 2

    identity = conditioning.load_instantid(pipe, ii.adapter(pipe.unet), encoder=encoder)
    picture = Image.new("RGB", (32, 32))
    given = identity.inputs_of(picture, (16, 16))
    want = identity.inputs(ii.face(), ii.SMALL, (16, 16))
    assert pictures == [picture] and given["image"] == want["image"]
    assert torch.equal(*(g["ip_adapter_image_embeds"][0] for g in (given, want)))
    assert identity.inputs_of(picture)["image"].size == (32, 32)
    for answer, message in [
        (None, "the encoder gave nothing"),
        ((np.zeros((0, 512)), ii.SMALL), "the encoder's face: no face"),
        ((ii.face(), ii.SMALL[:2]), r"the encoder's face: want keypoints \[5, 2\]"),
    ]:
        identity.encoder = lambda _, answer=answer: answer
        with pytest.raises(ValueError, match=message):
            identity.inputs_of(picture)
    identity.encoder = None
    with pytest.raises(ValueError, match="no encoder"):
        identity.inputs_of(picture)


# the file


def test_a_file_of_a_face_is_read(tmp_path):
    points = torch.tensor(ii.POINTS, dtype=torch.float64)
    for suffix in (".json", ".safetensors"):
        image, path = tmp_path / "a.png", tmp_path / f"a{suffix}"
        if suffix == ".json":
            assert faces.beside(image) is None
            path.write_text(json.dumps({"embedding": ii.face().tolist(), "keypoints": ii.POINTS}))
        else:
            save_file({"embedding": ii.face(), "keypoints": points.float()}, path)
        assert faces.beside(image) == path
        found = faces.read(path)
        assert torch.equal(found.embedding, ii.face()) and found.embedding.dtype == torch.float32
        assert torch.allclose(found.keypoints, points)
    broken = tmp_path / "b.json"
    for text, message in [
        ("{", "b.json is not JSON"),
        ("[1]", r"b.json: want embedding \[512\] and keypoints \[5, 2\], got list"),
        ('{"embedding": [1]}', r"b.json: want embedding .* got embedding"),
        ('{"embedding": [1], "keypoints": []}', r"b.json: want an embedding \[512\].* got \[1\]"),
        ('{"embedding": ["a"], "keypoints": []}', "b.json: want numbers, got a list"),
    ]:
        broken.write_text(text)
        with pytest.raises(ValueError, match=message):
            faces.read(broken)
