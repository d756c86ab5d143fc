"""Drawing the picture: captions and images to the left, the frontier to the right."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.picture.measure import Measured, Slim
from deploy.report.plots import Scale, log_scale

SHARP, DRAWN = 2, 4
"""Pixels of the file for one of the page, for screens have two; and while it is drawn, which makes edges smooth."""
WIDTH, MARGIN = 850, 14
"""Of a README's column on GitHub, and what is left white around everything, for pages that are dark."""
IMAGE, GAP, TEXT = 94, 8, 140
"""Of an image, between images, and of the captions' column."""
HEAD, FOOT = 62, 44
INK, FAINT, LINE = "#1f2328", "#656d76", "#d8dee4"
OURS, THEIRS = "#0969da", "#8c959f"


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * DRAWN)  # type: ignore[return-value]


class Canvas:
    """Drawing in the page's pixels."""

    def __init__(self, height: float) -> None:
        self.image = Image.new("RGB", (WIDTH * DRAWN, round(height) * DRAWN), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: float = 12, colour: str = INK, anchor: str = "la") -> None:
        """Words at a place; the anchor is Pillow's: `l`, `m`, `r` across and `a`, `m`, `d` down."""
        white: dict[str, Any] = {"stroke_width": 2 * DRAWN, "stroke_fill": "white"}  # where a line runs behind them
        self.pen.text((x * DRAWN, y * DRAWN), words, fill=colour, font=font(size), anchor=anchor, **white)

    def lines(self, points: Iterable[tuple[float, float]], colour: str, width: float = 1) -> None:
        scaled = [(x * DRAWN, y * DRAWN) for x, y in points]
        self.pen.line(scaled, fill=colour, width=round(width * DRAWN), joint="curve")

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        self.pen.circle((x * DRAWN, y * DRAWN), radius * DRAWN, fill=colour)

    def paste(self, x: float, y: float, image: Image.Image) -> None:
        """An image, `IMAGE` wide."""
        size = (IMAGE * DRAWN, IMAGE * DRAWN)
        self.image.paste(image.resize(size, Image.Resampling.LANCZOS), (round(x * DRAWN), round(y * DRAWN)))


def draw(measured: Measured) -> Image.Image:
    """The whole picture."""
    bottom = HEAD + max(2, len(measured.captions)) * (IMAGE + GAP) - GAP
    canvas = Canvas(bottom + FOOT)
    for row, words in enumerate(measured.captions):
        lines = wrapped(words, TEXT - 14, 11.5)
        middle = HEAD + row * (IMAGE + GAP) + IMAGE / 2
        for number, line in enumerate(lines):
            canvas.text(MARGIN, middle + (number - (len(lines) - 1) / 2) * 14.5, line, 11.5, FAINT, "lm")
    canvas.text(MARGIN, HEAD - 14, "parameters", 11.5, FAINT, "ls")
    canvas.text(MARGIN, bottom + 21, "in ONNX Runtime", 11.5, FAINT, "ls")
    columns = [("dense", measured.parameters, "1x", measured.images)]
    for slim in measured.slim:
        speed = f"{slim.speedup['median']:.2f}x as fast"
        columns.append((f"-{slim.percent:g} %", slim.parameters, speed, slim.images))
    x = MARGIN + TEXT
    for title, parameters, speed, images in columns:
        canvas.text(x + IMAGE / 2, HEAD - 34, title, 18, INK if title == "dense" else OURS, "ms")
        canvas.text(x + IMAGE / 2, HEAD - 14, f"{parameters / 1e6:.2f} M", 12.5, INK, "ms")
        for row, image in enumerate(images):
            canvas.paste(x, HEAD + row * (IMAGE + GAP), image)
        canvas.text(x + IMAGE / 2, bottom + 21, speed, 12.5, INK, "ms")
        x += IMAGE + GAP
    draw_frontier(canvas, measured.slim, x + 16, bottom)
    return canvas.image.reduce(DRAWN // SHARP)


def draw_frontier(canvas: Canvas, slims: list[Slim], start: float, bottom: float) -> None:
    """Noise-prediction error by the share of parameters that went, from `start` to the canvas's right margin."""
    left, right, top = start + 44, WIDTH - MARGIN, HEAD + 14
    down = log_scale(error for slim in slims for error in (slim.noise_error, slim.pruned_error))
    across = Scale(0, 1.08 * max(slim.percent for slim in slims))
    assert down is not None

    def place(percent: float, error: float) -> tuple[float, float]:
        return left + across.at(percent) / 100 * (right - left), bottom - down.at(error) / 100 * (bottom - top)

    canvas.text(start, HEAD - 34, "noise-prediction error", 15, INK, "ls")
    canvas.text(start, HEAD - 14, "on calls that calibration has not seen", 11.5, FAINT, "ls")
    for tick in down.ticks():
        y = bottom - tick.at / 100 * (bottom - top)
        canvas.lines([(left, y), (right, y)], LINE)
        canvas.text(left - 6, y, tick.label, 11.5, FAINT, "rm")
    for slim in slims:
        canvas.text(place(slim.percent, down.low)[0], bottom + 18, f"-{slim.percent:g} %", 11.5, FAINT, "ms")
    canvas.text(right, bottom + 34, "of the UNet's parameters", 11.5, FAINT, "rs")
    curves = {"magnitude pruning": (THEIRS, "pruned_error"), "slimdiff": (OURS, "noise_error")}
    for name, (colour, figure) in curves.items():
        points = [place(slim.percent, getattr(slim, figure)) for slim in slims]
        if len(points) > 1:
            canvas.lines(points, colour, 2)
        for point in points:
            canvas.dot(*point, colour)
        canvas.text(points[-1][0] + 4, points[-1][1] - 10, name, 13, colour, "rs")


def wrapped(words: str, width: float, size: float) -> list[str]:
    """The words in lines that are no wider than this."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width * DRAWN:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
