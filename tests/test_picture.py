"""The README's picture: what is drawn stands where it should, and the command makes it."""

from __future__ import annotations

import pytest
from PIL import Image

from benchmarks.picture import measure
from benchmarks.picture.__main__ import caption, main
from benchmarks.picture.draw import DRAWN, GAP, HEAD, IMAGE, MARGIN, SHARP, TEXT, WIDTH, draw, font, wrapped
from benchmarks.picture.measure import Measured, Slim
from exporters.latency.pair import Job

COLOURS = ["red", "green", "blue", "orange", "purple", "cyan"]


def squares(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), colour) for colour in colours]


@pytest.fixture
def measured() -> Measured:
    speed = {"low": 1.1, "median": 1.2, "high": 1.3}
    slims = [
        Slim(10, 1_500_000, 1e-6, 1e-3, speed, squares(*COLOURS[2:4])),
        Slim(50, 800_000, 1e-3, 1e-1, speed, squares(*COLOURS[4:])),
    ]
    captions = ["a large red circle top left, on a gray background"] * 2
    return Measured(captions, 1_700_000, squares(*COLOURS[:2]), slims, "ONNX Runtime 1.0, CPU", "a quiet machine")


def test_images_stand_by_model_and_caption_on_white(measured):
    picture = draw(measured)
    assert picture.width == WIDTH * SHARP
    for number, colour in enumerate(COLOURS):
        x = MARGIN + TEXT + number // 2 * (IMAGE + GAP) + IMAGE / 2
        y = HEAD + number % 2 * (IMAGE + GAP) + IMAGE / 2
        assert picture.getpixel((round(x * SHARP), round(y * SHARP))) == Image.new("RGB", (1, 1), colour).getpixel(
            (0, 0)
        )
    edge = MARGIN * SHARP - 1
    for box in ((0, 0, picture.width, edge), (0, 0, edge, picture.height), (picture.width - edge, 0, *picture.size)):
        assert picture.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), (255, 255, 255))]


def test_words_are_wrapped_to_their_column():
    words = "a small orange triangle bottom right, a small cyan circle bottom left, on a gray background"
    lines = wrapped(words, TEXT, 11.5)
    assert " ".join(lines) == words and len(lines) > 2
    assert all(font(11.5).getlength(line) <= TEXT * DRAWN for line in lines)


def test_the_caption_says_what_was_measured_and_where(measured):
    said = caption(measured)
    assert "-50 %: 1.20x (1.10 to 1.30)" in said and "-10 %: 1.0e-06 (magnitude pruning 1.0e-03)" in said
    assert "ONNX Runtime 1.0, CPU" in said and "Measured on a quiet machine" in said


@pytest.mark.parametrize("timed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untimed", "timed"])
def test_the_command_measures_and_draws(timed, tmp_path, capsys, monkeypatch):
    if timed:
        pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
        pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")
    else:
        found = {"speedup": {"low": 1.0, "median": 2.0, "high": 3.0}, "runtime": "no runtime"}
        monkeypatch.setattr(measure, "write_job", lambda name, *_: Job(name, "", "onnxruntime"))
        monkeypatch.setattr(measure, "bench", lambda *_, **__: found)
    file = tmp_path / "docs" / "picture.png"
    main(
        [*["--budgets", "25", "--captions", "1", "--steps", "1", "--samples", "2", "--pairs", "2"], "--out", str(file)]
    )
    picture = Image.open(file)
    assert picture.width == WIDTH * SHARP and file.stat().st_size < 300_000
    said = capsys.readouterr().out
    assert "-25 %: " in said and ("ONNX Runtime" if timed else "no runtime") in said
