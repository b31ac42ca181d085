"""Pixels of the original, every kind of image, and what is refused."""

import base64
import http.server
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from owl2_hf.processing import MplugOwl2ImageProcessor
from owl2_hf.processing import image_processing_mplug_owl2 as module

GOLDEN = Path(__file__).parents[1] / "golden" / "P"
MODES = {"resize": "resize", "pad": "pad", "none": "crop"}


def processor(side=28, **kwargs):
    return MplugOwl2ImageProcessor(size={"height": side, "width": side}, **kwargs)


def pixels(image, **kwargs):
    return processor()(image, return_tensors="pt", **kwargs).pixel_values


@pytest.fixture
def photo():
    array = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    return Image.fromarray(array)


@pytest.mark.parametrize(
    ("key", "expected"), load_file(GOLDEN / "pixel_values.safetensors").items()
)
def test_pixels_are_the_originals(key, expected):
    name, _, mode, side = key.split("/")
    image = Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")
    actual = processor(int(side), image_aspect_ratio=MODES[mode])(
        image, return_tensors="pt"
    ).pixel_values[0]
    assert torch.equal(actual, expected)


def test_pixels_are_the_originals_in_the_wider_set(golden_dir):
    folder = golden_dir("P")
    for key, expected in load_file(folder / "pixel_values.safetensors").items():
        name, kind, mode, side = key.split("/")
        # The original's channel bug.
        if kind == "rgb" and mode in MODES and key != "three_high_50x3/rgb/none/56":
            image = Image.open(folder / "images" / f"{name}.png").convert("RGB")
            actual = processor(int(side))(
                image, image_aspect_ratio=MODES[mode], return_tensors="pt"
            ).pixel_values
            assert torch.equal(actual[0], expected), key


FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
ALL_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")
SIZES = [(1, 1), (9, 9), (28, 28), (41, 41), (28, 17), (17, 28), (41, 3), (3, 41)]


def noise(size, mode="RGB"):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_skipping_a_resize_without_effect_gives_the_same_pixels(size, resample):
    edge, mean = max(size), tuple(int(channel * 255) for channel in module.OPENAI_CLIP_MEAN)
    for mode in ALL_MODES:
        picture = noise(size, mode)
        rgb = picture.convert("RGB")
        padded = Image.new("RGB", (edge, edge), mean)
        padded.paste(rgb, ((edge - size[0]) // 2, (edge - size[1]) // 2))
        squares = {"resize": rgb.resize((edge, edge), module.BICUBIC), "pad": padded}
        for ratio, square in squares.items():
            options = {"resample": Image.Resampling[resample], "image_aspect_ratio": ratio}
            actual = pixels(picture, do_rescale=False, do_normalize=False, **options)[0]
            expected = np.asarray(square.resize((28, 28), Image.Resampling[resample])).transpose(
                2, 0, 1
            )
            assert np.array_equal(actual, expected), (mode, ratio)


@pytest.mark.parametrize(
    ("size", "resamplings"), [((41, 41), 1), ((28, 28), 1), ((41, 20), 2), ((20, 41), 2)]
)
def test_a_square_picture_is_resampled_once(size, resamplings, monkeypatch):
    calls, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, *args, **kw: calls.append(args) or resize(self, *args, **kw),
    )
    pixels(noise(size))
    assert len(calls) == resamplings


@pytest.mark.parametrize("size", [(41, 20), (20, 41), (41, 40)])
def test_the_two_resamplings_of_other_pictures_are_not_one(size):
    joined = noise(size).resize((28, 28), module.BICUBIC)
    assert not torch.equal(pixels(noise(size)), pixels(joined))


def test_every_way_to_give_a_picture_is_the_same(photo, tmp_path):
    expected = pixels(photo)
    path = tmp_path / "an image.png"
    photo.save(path)
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    array = np.asarray(photo)
    ways = [
        str(path), path, content, text, f"data:image/png;base64,{text}",
        array, array.transpose(2, 0, 1), array / 255.0, array.astype(np.float32), array.astype(np.int64),
        torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1).to(torch.bfloat16).requires_grad_(),
    ]  # fmt: skip
    for way in ways:
        torch.testing.assert_close(pixels(way), expected, rtol=0, atol=1e-6)
    assert pixels([[photo], [photo, str(path)]]).shape == (3, 3, 28, 28)
    assert pixels(np.stack([array, array])).shape == (2, 3, 28, 28)


def test_the_input_array_is_not_changed(photo):
    array = np.asarray(photo).astype(np.float32) / 255
    before = array.copy()
    array.flags.writeable = False
    pixels(array)
    pixels(array[::-1])
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"]
)
def test_every_mode_shows_its_picture(mode):
    gray = Image.fromarray(np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[None], 40, axis=0))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    elif mode == "PA":
        image = gray.convert("P").convert("PA")
    else:
        image = (
            gray.convert("RGB").convert(mode)
            if mode in ("CMYK", "YCbCr", "HSV", "RGBA")
            else gray.convert(mode)
        )
    assert image.mode == mode
    error = (pixels(image) - pixels(gray)).abs().mean()
    assert error < (0.5 if mode == "1" else 0.05)


def test_transparency_is_dropped_as_in_the_original(photo):
    transparent = photo.convert("RGBA")
    transparent.putalpha(0)
    assert torch.equal(pixels(transparent), pixels(photo))


def test_exif_orientation_is_applied_to_what_is_opened(photo, tmp_path):
    upright = pixels(photo)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(pixels(tmp_path / "turned.png"), upright)
    exif[0x0112] = 99
    photo.save(tmp_path / "invalid.png", exif=exif)
    assert torch.equal(pixels(tmp_path / "invalid.png"), upright)


def test_the_first_frame_of_an_animation_counts(photo, tmp_path):
    photo.quantize().save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", photo.size)]
    )
    first = Image.open(tmp_path / "a.gif").convert("RGB")
    assert torch.equal(pixels(tmp_path / "a.gif"), pixels(first))


@given(
    width=st.integers(1, 9), height=st.integers(1, 9), mode=st.sampled_from(module.ASPECT_RATIOS)
)
@settings(max_examples=60, deadline=None)
def test_small_pictures_keep_their_channels(width, height, mode):
    colour = (250, 10, 120)
    values = processor(8, image_aspect_ratio=mode)(
        Image.new("RGB", (width, height), colour), return_tensors="np"
    )
    mean, std = np.array(module.OPENAI_CLIP_MEAN), np.array(module.OPENAI_CLIP_STD)
    centre = values.pixel_values[0][:, 4, 4]
    if mode != "pad" or width == height:
        np.testing.assert_allclose(centre, (np.array(colour) / 255 - mean) / std, atol=1e-5)
    assert values.pixel_values.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("mode", module.ASPECT_RATIOS)
def test_a_long_panorama_takes_little_memory(mode):
    panorama = Image.new("RGB", (65500, 2), (9, 200, 30))
    values = pixels(panorama, image_aspect_ratio=mode)
    assert values.shape == (1, 3, 28, 28)
    assert values[0, 1].max() > 1


def test_modes_differ_and_are_read_from_saved_settings(photo, tmp_path):
    results = [pixels(photo, image_aspect_ratio=mode) for mode in module.ASPECT_RATIOS]
    assert not any(
        torch.equal(a, b) for a, b in [(results[0], results[1]), (results[1], results[2])]
    )
    saved = processor(image_aspect_ratio="pad")
    for _ in range(3):
        saved.save_pretrained(tmp_path)
        saved = MplugOwl2ImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(saved(photo, return_tensors="pt").pixel_values, results[1])


def test_the_originals_settings_are_read():
    settings = {
        "crop_size": 448,
        "do_center_crop": True,
        "size": 448,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    loaded = MplugOwl2ImageProcessor.from_dict({**settings, "resample": 3})
    assert dict(loaded.size) == {"height": 448, "width": 448}
    assert loaded.image_aspect_ratio == "resize"
    assert dict(MplugOwl2ImageProcessor(size={"shortest_edge": 56}).size) == {
        "height": 56,
        "width": 56,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_aspect_ratio": "squash"}, "must be one of 'resize', 'pad', 'crop', got 'squash'"),
        ({"size": {"height": 4, "width": 5}}, "size must be a square"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MplugOwl2ImageProcessor(**values)


def eps(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")


def truncated(path):
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue()[:500])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path)


def empty(path):
    path.write_bytes(b"")


def too_long(path):
    with path.open("wb") as file:
        file.truncate(module.MAX_FILE_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (eps, "not an image in one of the formats PNG"),
        (truncated, "damaged"),
        (bomb, "pixels"),
        (empty, "not an image"),
        (too_long, "the limit is 67,108,864"),
    ],
)
def test_a_broken_file_is_named(make, message, tmp_path):
    path = tmp_path / "broken.png"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        pixels([Image.new("RGB", (4, 4)), str(path)])
    assert "broken.png" in str(caught.value)


def files():
    """A small image in each of the formats."""
    found = {}
    for kind in module.FORMATS:
        buffer = BytesIO()
        Image.effect_noise((16, 12), 90).convert("RGB").save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


FILES = files()


@given(
    kind=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0, 1),
    text=st.binary(max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_an_image_or_raise_a_value_error(kind, changes, keep, text):
    content = bytearray(FILES[kind])
    for place, value in changes:
        content[int(place * len(content))] = value
    for one in (
        bytes(content),
        bytes(content[: int(keep * len(content))]),
        text,
        bytes(content[:12]) + text,
    ):
        try:
            values = pixels(one)
        except ValueError as error:
            assert "image 1 of 1" in str(error) and " at 0x" not in str(error)
        else:
            assert values.shape == (1, 3, 28, 28) and values.isfinite().all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.full((4, 4, 3), 300), "got 300 to 300"),
        (np.full((4, 4, 3), -1.0), "got -1 to -1"),
        (np.zeros((5, 5, 2)), r"1, 3 or 4 channels .* \(5, 5, 2\)"),
        (np.zeros((0, 4, 3)), "no pixels"),
        (np.zeros(5), r"2 or 3 axes, got shape \(5,\)"),
        (np.array([["a"]]), "expected numbers"),
        (object(), "got object"),
        (Path("nowhere.png"), "the file does not exist"),
        ("nowhere.png", "expected an existing file"),
        ("/dev/null", "it is not a file"),
        (str(Path(__file__).parent), "it is not a file"),
        ("A" * 5000, r"text of 5,000 characters: it is not an image"),
        (b"no image", "not an image"),
    ],
)
def test_inputs_that_are_not_images_raise_a_value_error(image, message):
    with pytest.raises(ValueError, match=message) as caught:
        pixels(image)
    assert "0x" not in str(caught.value)


def test_a_damaged_picture_that_is_open_already_is_named(tmp_path):
    truncated(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"image 1 of 1: .*broken\.png': it is damaged"):
        pixels(Image.open(tmp_path / "broken.png"))


def test_sixteen_bits_are_scaled_alike_in_dark_and_bright_pictures():
    for value in (200, 40_000):
        image = Image.fromarray(np.full((4, 4), value, np.uint16))
        values = processor()(image, do_normalize=False, return_tensors="np").pixel_values
        np.testing.assert_allclose(values, value / 65535, atol=1 / 255)


@pytest.mark.parametrize("normalize", [True, False])
def test_floats_from_0_to_1_need_no_rescaling(photo, normalize):
    array = np.asarray(photo, dtype=np.float32) / 255
    expected = processor()([photo, photo], do_normalize=normalize, return_tensors="pt").pixel_values
    for image in (array, torch.from_numpy(array).permute(2, 0, 1)):
        actual = processor()(
            [image, image], do_normalize=normalize, do_rescale=False, return_tensors="pt"
        )
        assert torch.equal(actual.pixel_values, expected)
    both = processor()(
        [array, photo], do_normalize=False, do_rescale=False, return_tensors="pt"
    ).pixel_values
    assert both[0].max() <= 1 and torch.allclose(both[1], 255 * both[0])


def test_the_original_s_reading_is_that_of_pil(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    sixteen = Image.fromarray(np.linspace(0, 60_000, 400).reshape(20, 20).astype(np.uint16))
    sixteen.save(tmp_path / "sixteen.png")
    photo.convert("RGBA").quantize().save(tmp_path / "palette.png", transparency=3)
    for path in tmp_path.iterdir():
        expected = pixels(Image.open(path).convert("RGB"))
        assert torch.equal(pixels(path, original_reading=True), expected)
        assert torch.equal(
            processor(original_reading=True)(path, return_tensors="pt").pixel_values, expected
        )
        assert torch.equal(pixels(path), expected) == (path.stem == "palette")
        assert torch.equal(pixels(processor(original_reading=True).fetch_images(path)), expected)
    assert torch.equal(pixels(sixteen, original_reading=True), pixels(sixteen.convert("RGB")))


def test_the_reading_is_saved_where_it_is_the_original_s():
    assert processor(original_reading=True).to_dict()["original_reading"] is True
    assert "original_reading" not in processor().to_dict()


def test_files_with_invalid_values_are_named(tmp_path):
    path = tmp_path / "part.tif"
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    for image in (path, str(path), Image.open(path)):
        with pytest.raises(ValueError, match=r"image 1 of 1: '.*part\.tif': it holds NaN"):
            pixels(image)
    Image.fromarray(np.full((4, 4), 400, np.float32)).save(path)
    with pytest.raises(ValueError, match=r"part\.tif': expected values from 0 to 255"):
        pixels(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4, 4, device="meta"), torch.zeros(4, 4).to_sparse()],
    ids=["meta", "sparse"],
)
def test_a_tensor_without_numbers_is_refused(tensor):
    with pytest.raises(
        ValueError, match="image 1 of 1: expected a dense tensor that holds numbers, got a"
    ):
        pixels(tensor)


def test_resample_nearest_is_not_treated_as_missing(photo):
    nearest = pixels(photo, resample=Image.Resampling.NEAREST)
    assert not torch.equal(nearest, pixels(photo))


def test_damaged_exif_data_are_ignored(photo, tmp_path):
    path = tmp_path / "a.jpg"
    photo.save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert torch.equal(pixels(path), pixels(Image.open(path)))


def test_the_number_of_a_bad_picture_is_named():
    with pytest.raises(ValueError, match="image 2 of 2: it holds NaN"):
        pixels([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)])
    with pytest.raises(ValueError, match="Expected at least one image, got none"):
        pixels([])


@pytest.fixture
def server(photo):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                with np.errstate(all="ignore"):
                    try:
                        while True:
                            self.wfile.write(bytes(2**20))
                    except OSError:
                        return
            elif self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"x")
                        time.sleep(0.05)
                except OSError:
                    return
            elif self.path == "/photo.png":
                self.send_response(200)
                self.end_headers()
                photo.save(self.wfile, "PNG")
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_secrets_in_urls_are_not_repeated(server):
    with pytest.raises(ValueError, match="the download failed") as caught:
        pixels(f"{server}/missing?token=secret")
    assert "secret" not in str(caught.value)


def test_urls_are_fetched_within_limits(server, photo, monkeypatch):
    assert torch.equal(pixels(f"{server}/photo.png"), pixels(photo))
    for path, message in (
        ("missing", "the download failed"),
        ("away", "the download failed"),
        ("endless", "more than"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            pixels(f"{server}/{path}")
        assert path in str(caught.value)
    monkeypatch.setattr(module, "URL_TIMEOUT", 0.5)
    with pytest.raises(ValueError, match=r"the download took more than 0\.5 seconds"):
        pixels(f"{server}/drip")
