"""Squares that cover an image."""

import math

from ..processing.image_processing_mplug_owl2 import MplugOwl2ImageProcessor


def crop_boxes(width: int, height: int, side: int) -> list[tuple[int, int, int, int]]:
    """Squares of this side that cover an image, row by row, at even steps; the fewest that do, so
    they may overlap.

    Returns:
        (left, top, right, bottom) of each. Where the image is smaller than the side, a box ends
        with the image.
    """

    def starts(length: int) -> list[int]:
        steps = math.ceil(length / side) - 1
        return (
            [round(step * (length - side) / steps) for step in range(steps + 1)]
            if steps > 0
            else [0]
        )

    return [
        (left, top, min(left + side, width), min(top + side, height))
        for top in starts(height)
        for left in starts(width)
    ]


def side_of(image_processor: MplugOwl2ImageProcessor) -> int:
    """The side of the model's square, in pixels."""
    size = dict(image_processor.size)
    return size.get("height") or size["shortest_edge"]
