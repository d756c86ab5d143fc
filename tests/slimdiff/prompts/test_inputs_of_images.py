"""What prompts may be, in Python, files and recipes: right, or refused naming the first that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.recipe.prompts import all_prompts
from deploy.recipe.recipe import make_recipe
from slimdiff import Compressor, InputError, Sampling, compare
from slimdiff.calibration.calibrate import calibrate
from slimdiff.denoising.trajectory import record_calls, sample_images
from slimdiff.prompts import check_inputs, read_file

TWO = ["a red circle", "a blue star"]


@pytest.mark.parametrize(
    "prompts", [TWO, tuple(TWO), iter(TWO), (p for p in TWO), np.array(TWO), dict.fromkeys(TWO).keys(), map(str, TWO)]
)
def test_any_iterable_of_texts_becomes_a_list_once(prompts):
    found = check_inputs(prompts)
    assert found == TWO and all(type(prompt) is str for prompt in found)


def test_a_text_alone_is_one_prompt_and_a_mapping_one_image():
    assert check_inputs("a red circle") == ["a red circle"]
    assert check_inputs({"class_labels": 207}) == [{"class_labels": 207}] and check_inputs([{}]) == [{}]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a", None], r"prompts\[1\] is NoneType, not a text"),
        (["a", 5], r"prompts\[1\] is int"),
        (["a", float("nan")], r"prompts\[1\] is float"),
        (["a", b"b"], r"prompts\[1\] is bytes"),
        (["a", ["b"]], r"prompts\[1\] is list"),
        (["a", " \n"], r"prompts\[1\] is empty"),
        ("", "prompts is empty"),
        (b"a red circle", "prompts are a list of texts, not bytes"),
        (7, "not int"),
        (None, "not NoneType"),
        (["a", "\udcff"], r"prompts\[1\] holds bytes that are no UTF-8"),
        ([{"prompt": "a"}, {"prompt": 3}], r"prompts\[1\]\['prompt'\] is int"),
        ([{"prompt": "a", "negative_prompt": ["b"]}], r"prompts\[0\]\['negative_prompt'\] is list"),
        ([{"prompt": "a", "prompt_2": b"b"}], r"prompts\[0\]\['prompt_2'\] is bytes"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_number(prompts, says, pipeline, calibration):
    with pytest.raises(InputError, match=says):
        check_inputs(prompts)
    for door in (lambda: Compressor(pipeline, prompts), lambda: calibrate(pipeline, prompts, calibration)):
        with pytest.raises(InputError, match=says):
            door()


def test_every_door_takes_a_text_alone_for_one_prompt(pipeline, calibration):
    sampling = Sampling(steps=1, guidance=1.0)
    assert len(sample_images(pipeline, "a red circle", sampling)) == 1
    assert record_calls(pipeline, "a red circle", sampling)[0].arguments["sample"].shape[0] == 1
    assert calibrate(pipeline, "a red circle", calibration).made_from["prompts"] == 1
    assert calibrate(pipeline, iter(TWO), calibration).made_from["prompts"] == 2
    assert compare(pipeline, pipeline, (p for p in TWO), sampling)["images"]["count"] == 2


def test_no_prompt_is_refused(pipeline, calibration):
    for door in (lambda p: calibrate(pipeline, p, calibration), lambda p: compare(pipeline, pipeline, p)):
        with pytest.raises(InputError, match="there is no prompt"):
            door([])


def test_a_negative_prompt_for_all_is_a_text_too(pipeline):
    with pytest.raises(InputError, match=r"arguments\['negative_prompt'\] is int"):
        sample_images(pipeline, TWO, Sampling(steps=1, arguments={"negative_prompt": 5}))


def test_lines_of_a_file_end_in_line_feeds_alone_and_a_mark_at_its_front_is_none_of_them(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red\u2028circle\r\n\n  a blue\x0bstar \na\x85b\x0cc\x1cd".encode())
    assert read_file(file) == ["a red\u2028circle", "a blue\x0bstar", "a\x85b\x0cc\x1cd"]
    assert all_prompts(str(file)) == read_file(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_another_encoding_is_refused_in_one_line(tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein kleines M\u00e4dchen\n".encode(encoding))
    with pytest.raises(InputError, match="is not UTF-8.*: save it as UTF-8, one prompt a line"):
        read_file(file)


@pytest.mark.parametrize("prompts", [["a", ""], ["a", "  "], [], ["a", "\ud800"]])
def test_a_recipe_says_which_of_its_prompts_is_none(tmp_path, prompts):
    with pytest.raises(InputError, match=r"^r.yaml: prompts.*(prompt|UTF-8|unicode)"):
        make_recipe({"model": "demo", "prompts": prompts}, "r.yaml", tmp_path)
