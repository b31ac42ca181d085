"""Image processor of mPLUG-Owl2: opens images safely, makes them square, resizes and normalises.

H, W: height and width of an image, S: side of the final square, N: images.

This is one file because the Hub finds an image processor by its file name.
"""

import base64
import binascii
import http.client
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

ASPECT_RATIOS = ("resize", "pad", "crop")  # these make one square of each image, "anchors" several
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_FILE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 89_478_485  # PIL's own threshold for a decompression bomb
URL_TIMEOUT = 20.0  # seconds for a whole download
BICUBIC = Image.Resampling.BICUBIC

# Upstream: grids of crops as (rows, columns), by name. If several fit equally well, the first is
# used, so the order matters. It is not sorted, and differs between names.
CROP_ANCHORS: dict[str, list[tuple[int, int]]] = {
    "grid_1": [(1, 1)],
    "grid_4": [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1)],
    "grid_9": [
        *[
            (1, 1),
            (1, 2),
            (2, 1),
            (1, 3),
            (3, 1),
            (2, 2),
            (1, 4),
            (4, 1),
            (1, 5),
            (5, 1),
            (1, 6),
            (6, 1),
            (2, 3),
        ],
        *[(3, 2), (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1)],
    ],
    "grid_3x3": [(3, 3)],
    "grid_20": [
        *[
            (1, 1),
            (1, 2),
            (2, 1),
            (1, 3),
            (3, 1),
            (1, 4),
            (2, 2),
            (4, 1),
            (1, 5),
            (5, 1),
            (1, 6),
            (2, 3),
            (3, 2),
        ],
        *[
            (6, 1),
            (1, 7),
            (7, 1),
            (1, 8),
            (2, 4),
            (4, 2),
            (8, 1),
            (1, 9),
            (3, 3),
            (9, 1),
            (1, 10),
            (2, 5),
            (5, 2),
        ],
        *[
            (10, 1),
            (1, 11),
            (11, 1),
            (2, 6),
            (3, 4),
            (4, 3),
            (6, 2),
            (2, 7),
            (7, 2),
            (3, 5),
            (5, 3),
            (2, 8),
            (4, 4),
        ],
        *[(8, 2), (2, 9), (3, 6), (6, 3), (9, 2), (2, 10), (4, 5), (5, 4), (10, 2)],
    ],
}
# Settings that only `image_aspect_ratio="anchors"` uses and saves.
_ANCHOR_SETTINGS = ("crop_anchors", "add_global_image", "add_text_crop_tags")


class MplugOwl2ImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of `MplugOwl2ImageProcessor`."""

    image_aspect_ratio: str | None
    max_image_pixels: int | None
    crop_anchors: str | None
    add_global_image: bool | None
    add_text_crop_tags: bool | None
    original_reading: bool | None


class MplugOwl2ImageProcessor(PilBackend):
    """Prepare images with PIL. The model was trained with PIL's resampling.

    Args:
        image_aspect_ratio: How an image is made square. "resize" stretches it to a square with the
            side of its longer edge, and then resizes it to the final size, in two resamplings as
            the original does. "pad" centres it on a square of the mean colour. "crop" resizes the
            shorter edge and crops the centre, as CLIP does. "anchors" chooses the grid that fits
            the image's shape best and makes several square crops, row by row, as DocOwl does.
        size: `{"height": S, "width": S}`, the size of the final square. A number, or CLIP's
            `{"shortest_edge": S}`, means the same.
        max_image_pixels: An image with more pixels raises an error before it is decoded. If only
            the square of its longer edge has more, the first of the two resamplings is skipped, so
            the pixels of such a panorama differ from the original's.
        crop_anchors: Name in `CROP_ANCHORS`: the grids that "anchors" chooses from.
        add_global_image: With "anchors", also put the whole image, stretched to a square, before
            the crops. Use `False` for DocOwl 1.5's first-stage checkpoints.
        add_text_crop_tags: Used by the processor: name each crop of "anchors" in the prompt, for
            example `<crop_img_row0_col0>`.
        original_reading: Read files as the original, Q-Align and pyiqa do, with only PIL's
            `convert("RGB")`, to reproduce the papers' numbers: EXIF orientation is not applied, and
            16-bit grey is clipped at 255, not scaled.

    Images may be PIL images, arrays, tensors, paths, URLs, data URLs, base64 strings or bytes,
    singly or in lists. EXIF orientation is applied to images that are opened here, but not to PIL
    images. Transparency is dropped, as in the original. 16-bit grey is scaled to 8 bits. The first
    frame of an animation is used. Arrays hold values from 0 to 255, or floats from 0 to 1, which
    mean the same with and without `do_rescale`. If the shape is ambiguous, channels are the last
    axis of arrays and the first axis of tensors.

    Raises:
        ValueError: If an image is broken, too large, or of an unknown type. The message names the
            image.
    """

    valid_kwargs = MplugOwl2ImageProcessorKwargs
    model_input_names = ["pixel_values"]
    image_aspect_ratio = "resize"
    max_image_pixels = MAX_IMAGE_PIXELS
    crop_anchors = "grid_9"
    add_global_image = True
    add_text_crop_tags = True
    original_reading = False
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def _standardize_kwargs(self, size: Any = None, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("image_aspect_ratio") not in (*ASPECT_RATIOS, "anchors"):
            raise ValueError(
                f"image_aspect_ratio must be one of {', '.join(map(repr, ASPECT_RATIOS))}, "
                f"got {kwargs.get('image_aspect_ratio')!r}; DocOwl's crops are 'anchors'."
            )
        if kwargs.get("crop_anchors") not in CROP_ANCHORS:
            names = ", ".join(map(repr, CROP_ANCHORS))
            raise ValueError(
                f"crop_anchors must be one of {names}, got {kwargs.get('crop_anchors')!r}."
            )
        # Only `image_aspect_ratio` controls the cropping; CLIP's own settings have no effect.
        kwargs.update(do_center_crop=None, crop_size=None)
        kwargs = super()._standardize_kwargs(size=size, **kwargs)
        size = kwargs["size"]
        side = size.shortest_edge or size.height
        if not side or (size.width or side) != side:
            raise ValueError(
                f"size must be a square such as {{'height': 448, 'width': 448}}, got {dict(size)}."
            )
        kwargs["size"] = SizeDict(height=side, width=side)
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict.

        Differs from transformers: settings without an effect are left out.
        """
        values = super().to_dict()
        if self.image_aspect_ratio != "anchors":
            values = {key: value for key, value in values.items() if key not in _ANCHOR_SETTINGS}
        if not self.original_reading:
            values.pop("original_reading", None)
        return values

    def num_crops(
        self,
        height: int,
        width: int,
        size: dict[str, int] | None = None,
        image_aspect_ratio: str | None = None,
        crop_anchors: str | None = None,
        add_global_image: bool | None = None,
        **kwargs: Any,
    ) -> int:
        """Return how many squares one image becomes. Default settings: those of this processor."""
        if (image_aspect_ratio or self.image_aspect_ratio) != "anchors":
            return 1
        side = dict(size or self.size)
        anchors = CROP_ANCHORS[crop_anchors or self.crop_anchors]
        rows, columns = best_anchor(
            height, width, side.get("height") or side["shortest_edge"], anchors
        )
        return rows * columns + int(
            self.add_global_image if add_global_image is None else add_global_image
        )

    def fetch_images(self, images: Any) -> Any:
        """Open every path, URL, base64 string or bytes object. The nesting of lists is kept."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, Path, bytes)):
            return open_image(images, self.max_image_pixels, self.original_reading)
        return images

    def _prepare_image_like_inputs(
        self, images: Any, *args: Any, **kwargs: Any
    ) -> list[Image.Image]:
        flat = flatten_images(images)
        if not flat:
            raise ValueError("Expected at least one image, got none.")
        return [
            _named(f"image {index} of {len(flat)}", partial(self.process_image, picture, **kwargs))
            for index, picture in enumerate(flat, start=1)
        ]

    def process_image(
        self,
        image: Any,
        *,
        input_data_format: str | ChannelDimension | None = None,
        max_image_pixels: int | None = None,
        do_rescale: bool | None = True,
        original_reading: bool | None = None,
        **kwargs: Any,
    ) -> Image.Image:
        """One image of any kind -> RGB."""
        max_image_pixels = max_image_pixels or self.max_image_pixels
        original_reading = self.original_reading if original_reading is None else original_reading
        if isinstance(image, (str, Path, bytes)):
            return open_image(image, max_image_pixels, original_reading)
        if isinstance(image, Image.Image):
            _check_size(image, max_image_pixels)  # before anything is decoded
        picture = to_rgb(image, input_data_format, original_reading)
        _check_size(picture, max_image_pixels)
        if do_rescale is False and "float" in str(getattr(image, "dtype", "")) and image.max() <= 1:
            picture.info["is_rescaled"] = True  # to_rgb multiplied by 255
        return picture

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: list[float],
        image_std: list[float],
        return_tensors: str | None,
        image_aspect_ratio: str = "resize",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        crop_anchors: str = "grid_9",
        add_global_image: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """N RGB images -> `pixel_values` (squares, 3, S, S) float32, N squares or with "anchors"
        more.

        With "anchors" also `crop_grid` (N, 2), rows and columns of each image's crops.
        """
        resample = BICUBIC if resample is None else resample
        data: dict[str, list[Any]] = {"pixel_values": []}
        if image_aspect_ratio == "anchors":
            if not do_resize:
                raise ValueError("'anchors' cuts images after resizing them; leave do_resize on.")
            anchors = CROP_ANCHORS[crop_anchors]
            data["crop_grid"] = [
                best_anchor(image.height, image.width, size.height, anchors) for image in images
            ]
        # A channel has 256 values: compute them once, (3, 256), then look each pixel up.
        shades = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
        values_of_shades = {}
        for rescale in {do_rescale or "is_rescaled" in image.info for image in images}:
            values = (
                self.rescale(shades, rescale_factor if do_rescale else 1 / 255)
                if rescale
                else shades
            )
            values = self.normalize(values, image_mean, image_std) if do_normalize else values
            values_of_shades[rescale] = values[:, 0]
        for index, image in enumerate(images):
            values_of_channels = values_of_shades[do_rescale or "is_rescaled" in image.info]
            squares: Iterable[Image.Image] = [image]
            if do_resize and image_aspect_ratio == "anchors":
                squares = _cut(
                    image, size.height, resample, data["crop_grid"][index], add_global_image
                )
            elif do_resize:
                make_square = {"resize": _stretch, "pad": _pad, "crop": _crop}[image_aspect_ratio]
                squares = [make_square(image, size.height, resample, max_image_pixels, image_mean)]
            for square in squares:
                channels = np.asarray(square).transpose(2, 0, 1)
                pixels = [
                    values[channel]
                    for values, channel in zip(values_of_channels, channels, strict=True)
                ]
                data["pixel_values"].append(np.stack(pixels))
        return BatchFeature(data, tensor_type=return_tensors)


def best_anchor(
    height: int, width: int, side: int, anchors: list[tuple[int, int]]
) -> tuple[int, int]:
    """Rows and columns of the grid that suits an image: first by its shape, then by its size.

    Args:
        side: Pixels along one side of a crop.
        anchors: The choice.
    """
    # Upstream: everything in float32, but the scaled height is cut to a whole number.
    heights, widths = (np.array(anchors, dtype=np.float32) * np.float32(side)).T
    scaled = np.trunc(np.float32(height / width) * widths)
    by_shape = _overlap(heights, widths, scaled, widths)
    by_size = _overlap(heights, widths, np.float32(height), np.float32(width))
    return anchors[int(np.argmax(np.float32(100) * by_shape + by_size))]


def _overlap(
    height: np.ndarray, width: np.ndarray, other_height: Any, other_width: Any
) -> np.ndarray:
    """Intersection over union of rectangles with a common corner."""
    common = np.minimum(height, other_height) * np.minimum(width, other_width)
    return common / (height * width + other_height * other_width - common)


def _cut(
    picture: Image.Image, side: int, resample: int, grid: tuple[int, int], add_global: bool
) -> Iterator[Image.Image]:
    """The whole image as one square, then the crops row by row; all are resized from the image
    itself.
    """
    rows, columns = grid
    if add_global:
        yield picture.resize((side, side), resample)
    resized = picture.resize((columns * side, rows * side), resample)
    for row in range(rows):
        for column in range(columns):
            left, top = column * side, row * side
            yield resized.crop((left, top, left + side, top + side))


def _stretch(
    picture: Image.Image, side: int, resample: int, max_pixels: int, mean: list[float]
) -> Image.Image:
    edge = max(picture.size)
    if picture.size != (edge, edge) and edge**2 <= max_pixels:  # PIL would copy a square
        picture = picture.resize((edge, edge), BICUBIC)
    return picture.resize((side, side), resample)


def _pad(
    picture: Image.Image, side: int, resample: int, max_pixels: int, mean: list[float]
) -> Image.Image:
    edge = max(picture.size)
    if edge**2 > max_pixels:
        scale = side / edge
        picture = picture.resize(
            [max(1, round(length * scale)) for length in picture.size], resample
        )
        edge = side
    if picture.size == (edge, edge):
        return picture.resize((side, side), resample)
    square = Image.new(
        "RGB", (edge, edge), tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3))
    )
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square.resize((side, side), resample)


def _crop(
    picture: Image.Image, side: int, resample: int, max_pixels: int, mean: list[float]
) -> Image.Image:
    width, height = picture.size
    short = min(width, height)
    longer = int(side * max(width, height) / short)
    if longer * side > max_pixels:
        left, top = (width - short) / 2, (height - short) / 2
        return picture.resize((side, side), resample, box=(left, top, left + short, top + short))
    picture = picture.resize((side, longer) if width <= height else (longer, side), resample)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_IMAGE_PIXELS, original_reading: bool = False
) -> Image.Image:
    """Open an image from a path, an http(s) URL, a data URL, base64 or bytes, in RGB and upright.

    Args:
        original_reading: As for `MplugOwl2ImageProcessor`.

    Raises:
        ValueError: If it cannot be read, is not an image in one of `FORMATS`, or is too large.
    """
    read: Callable[[], bytes]
    if isinstance(source, bytes):
        name, read = "bytes", lambda: source
    elif isinstance(source, Path) or _exists(source):
        name, read = repr(str(source)), partial(_read_file, Path(source))
    elif source.startswith(("http://", "https://")):
        name, read = repr(_without_secrets(source)), partial(_download, source)
    elif source.startswith("data:"):
        name, read = "data URL", partial(_decode_base64, source.partition(",")[2])
    else:
        name = repr(source) if len(source) <= 100 else f"text of {len(source):,} characters"
        read = partial(_decode_base64, source)
    return _named(name, lambda: _decode(read(), max_pixels, original_reading))


def _named(name: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _exists(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except (OSError, ValueError):  # too long for a name, or not a name at all
        return False


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("it is not a file." if path.exists() else "the file does not exist.")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"the file has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}.")
    return path.read_bytes()


def _without_secrets(url: str) -> str:
    """The URL without user, password and query, which may hold secrets."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:200]


def _download(url: str) -> bytes:
    """The content behind a URL; redirects lead to http and https alone."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    request = urllib.request.Request(
        url, headers={"User-Agent": "Mozilla/5.0 (compatible; mplug-owl2)"}
    )
    deadline = time.monotonic() + URL_TIMEOUT
    content = bytearray()
    try:
        with opener.open(request, timeout=URL_TIMEOUT / 2) as response:
            while chunk := response.read1(2**16):
                content += chunk
                if len(content) > MAX_FILE_BYTES:
                    raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes.")
                if time.monotonic() > deadline:
                    raise ValueError(f"the download took more than {URL_TIMEOUT:g} seconds.")
        return bytes(content)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or type(error).__name__
        raise ValueError(f"the download failed ({reason}).") from None


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(
            "expected an existing file, an http(s) URL, a data URL or base64."
        ) from None


def _decode(content: bytes, max_pixels: int, original_reading: bool) -> Image.Image:
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, the limit is {MAX_FILE_BYTES:,}.")
    try:
        picture = Image.open(BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            "it has more pixels than PIL's limit; see PIL.Image.MAX_IMAGE_PIXELS."
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"it is not an image in one of the formats {', '.join(FORMATS)}."
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise ValueError(f"it is damaged ({type(error).__name__}).") from None
    _check_size(picture, max_pixels)
    _load(picture)
    upright: Image.Image = picture
    if not original_reading:
        with suppress(Exception):  # with damaged EXIF data the pixels can still be good
            upright = ImageOps.exif_transpose(picture)
    return to_rgb(upright, original_reading=original_reading)


def _load(picture: Image.Image) -> None:
    """Decode an image that PIL has opened."""
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged, see _decode
        raise ValueError(f"it is damaged ({type(error).__name__}).") from None


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise ValueError(
            f"it has {picture.width} x {picture.height} pixels, the limit is {max_pixels:,} in "
            "all; make it smaller, or raise max_image_pixels."
        )


def to_rgb(
    image: Any,
    input_data_format: str | ChannelDimension | None = None,
    original_reading: bool = False,
) -> Image.Image:
    """A PIL image, array or tensor as an RGB PIL image, which may be the very one that came."""
    if isinstance(image, Image.Image):
        read = partial(_pil_to_rgb, image, original_reading)
        name = getattr(image, "filename", None)  # PIL sets it on images from a file
        return _named(repr(str(name)), read) if name else read()
    # A tensor, with channels first unless its shape says otherwise.
    if hasattr(image, "detach"):
        try:
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        except (NotImplementedError, RuntimeError, TypeError):
            kind = f"{str(image.layout).removeprefix('torch.')} tensor of {image.dtype} on {image.device.type}"
            raise ValueError(f"expected a dense tensor that holds numbers, got a {kind}.") from None
        return _array_to_rgb(image, input_data_format, ambiguous=ChannelDimension.FIRST)
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image, input_data_format, ambiguous=ChannelDimension.LAST)
    raise ValueError(
        "expected a PIL image, an array, a tensor, a path, a URL or base64, got "
        f"{type(image).__name__}."
    )


def _pil_to_rgb(image: Image.Image, original_reading: bool) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise ValueError(f"it has no pixels ({image.width} x {image.height}).")
    _load(image)
    if image.mode == "RGB":
        return image
    if original_reading:
        return _convert(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        if image.mode != "I" or values.max() > 255:
            values = values / 257 + 0.5
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _array_to_rgb(np.asarray(image))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return _convert(image)


def _convert(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(
            f"images of mode {image.mode!r} are not supported; convert it to RGB first."
        ) from None


def _array_to_rgb(
    array: np.ndarray,
    input_data_format: str | ChannelDimension | None = None,
    ambiguous: ChannelDimension = ChannelDimension.LAST,
) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim != 3:
        raise ValueError(f"expected an array of 2 or 3 axes, got shape {array.shape}.")
    else:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if input_data_format is None:
            if not first and not last:
                raise ValueError(
                    f"expected 1, 3 or 4 channels first or last, got shape {array.shape}."
                )
            both = first and last
            input_data_format = (
                ambiguous if both else (ChannelDimension.FIRST if first else ChannelDimension.LAST)
            )
        if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
            array = array.transpose(1, 2, 0)
    if array.size == 0:
        raise ValueError(f"it has no pixels (shape {array.shape}).")
    array = np.ascontiguousarray(_to_uint8(array))
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).convert("RGB")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers from 0 to 255 or from 0 to 1, got {array.dtype}.")
    if not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinite values.")
    low, high = float(array.min()), float(array.max())
    if array.dtype == np.uint16 and high > 255:
        return (array / 257 + 0.5).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(f"expected values from 0 to 255 or from 0 to 1, got {low:g} to {high:g}.")
    if array.dtype.kind == "f" and high <= 1:
        array = array * 255
    return np.round(array).astype(np.uint8)


def is_many(images: Any) -> bool:
    """Whether this is a list, or an array or tensor of several images."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


def flatten_images(images: Any) -> list[Any]:
    """Every single image of nested lists and arrays, in order."""
    return (
        [picture for image in images for picture in flatten_images(image)]
        if is_many(images)
        else [images]
    )


MplugOwl2ImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["MplugOwl2ImageProcessor"]
