"""Sections of the report, each by what only it shows."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from reports import edit, fake_build, report_of, save, text_of

from deploy.artifacts import build_folder
from deploy.report.page import write_report
from deploy.report.sections import noise
from deploy.report.sections.gates import gate_bound, gate_value
from slimdiff.errors import InputError

# --- gates and parity ---------------------------------------------------------------------------------------------


def test_gates_are_said_with_their_unit():
    speedup = {"gate": "speedup", "value": 1.187, "bound": 1.05, "better": "higher", "unit": "x", "verdict": "pass"}
    assert gate_value(speedup) == "1.19\u00d7" and gate_bound(speedup) == "\u2265\u00a01.05\u00d7"
    psnr = {"gate": "psnr_db", "value": None, "bound": 30, "better": "higher", "unit": "dB", "verdict": "pass"}
    assert gate_value(psnr) == "identical"
    assert gate_value(speedup | {"value": None, "verdict": "inconclusive"}) == "not measured"


def test_failed_gate_and_parity_come_first(build):
    result = build_folder.read(build, "build")
    result["gates"][0] |= {"verdict": "fail", "value": False}
    save(build, "build", result | {"verdict": "fail", "exit_code": 1})
    validate = build_folder.read(build, "validate")
    part = validate["parts"][0]
    part |= {"passed": False, "first_diverging": "out_sample@t=641"}
    part["checks"][5] |= {"value": 0.0123, "passed": False}
    part["checks"][4] |= {"value": None, "passed": False}
    save(build, "validate", validate)
    text = text_of(report_of(build))
    assert "Failed: 1 of 4 gates does not hold" in text and "First to diverge: out_sample@t=641" in text
    worst = text[text.index("The worst of each metric") : text.index("All 12 checks")]
    assert "0.0123" in worst and "fail" in worst


# --- figures and latency ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speedup": {"median": 1.01, "low": 0.98, "high": 1.04}}, "the interval holds 0 %"),
        ({}, "the interval holds its bound"),
    ],
)
def test_latency_says_when_it_is_inconclusive(build, changes, said):
    edit(build, "bench", **changes)
    result = build_folder.read(build, "build")
    result["gates"][1]["verdict"] = "inconclusive"
    save(build, "build", result | {"verdict": "inconclusive", "exit_code": 4})
    assert said in text_of(report_of(build))


# --- noise --------------------------------------------------------------------------------------------------------


def test_the_error_is_drawn_over_times_that_are_not_whole(build):
    times = [1.0954999923706055, 0.5686483383178711, -0.18877407908439636, -1.553699016571045]
    before = build_folder.read(build, "compare")["noise_error"]
    edit(build, "compare", noise_error=before | {"by_timestep": [[t, 0.001 * (3 - t)] for t in times]})
    chart = noise.build({"compare": build_folder.read(build, "compare"), "build": build_folder.read(build, "build")})[
        "noise"
    ]
    assert [row[0] for row in chart["rows"]] == ["1.0955", "0.568648", "-0.188774", "-1.5537"]
    places = [x for x, _, _ in chart["points"]]
    assert places == sorted(places) and (places[0], places[-1]) == (0.0, 100.0)
    assert all(0 <= tick.at <= 100 for tick in chart["x"]) and len({tick.label for tick in chart["x"]}) > 2
    assert "largest at t = -1.5537" in chart["summary"].replace("\u00a0", " ")
    assert "t = 1.0955:" in report_of(build)


def test_what_a_schedule_saves_is_a_figure(build):
    assert "MACs of an image" not in text_of(report_of(build))
    figures = build_folder.read(build, "build")["figures"]
    edit(build, "build", figures=figures | {"macs_per_image": {"dense": 4_000, "slim": 1_000, "saved": 0.75}})
    edit(build, "compare", schedule={"says": "6 steps: 3 guided, 2 whole"})
    text = text_of(report_of(build))
    assert "Five figures, dense to slim" in text and "slim by its schedule (6 steps: 3 guided, 2 whole)" in text
    assert "75" in text[text.index("MACs of an image") : text.index("slim by its schedule")]


# --- engine -------------------------------------------------------------------------------------------------------


def test_the_size_of_an_engine_is_explained_and_that_it_was_not_run(build):
    edit(build, "engine", weights=10_400_000, precision="fp16")
    text = text_of(report_of(build))
    assert "compiled network for all 2 targets, kernels and constants beside the weights in fp16" in text
    assert "20.87 MB in their files and 10.40 MB in the graph that the engine was built from" in text
    assert "Built here, not run (no such GPU on this machine)" in text
    edit(build, "engine", weights=None, targets=[])  # an older build's engine, for the GPU of its machine
    edit(build, "build", machine={"gpus": ["NVIDIA L4"]})
    text = text_of(report_of(build))
    assert "compiled network, kernels" in text and "in their files." in text
    assert "Built here, not run (the GPU here is NVIDIA L4" in text


# --- sites --------------------------------------------------------------------------------------------------------


def test_every_site_is_named(build):
    text = re.sub(r"</?span[^>]*>|<wbr>", "", report_of(build))
    for name in build_folder.read(build, "plan")["sites"]:
        assert f">{name}</th>" in text


def test_sites_that_were_not_asked_for_are_counted_and_not_drawn(build):
    plan = build_folder.read(build, "plan")
    assert "not asked for" not in text_of(report_of(build))
    name, site = next((n, s) for n, s in plan["sites"].items() if s["group"] == "feed_forward")
    nothing = {"local_error": None, "sensitivity": None, "predicted_error": None}
    plan["sites"][name] = {**site, **nothing, "rank": site["dense_rank"]}
    save(build, "plan", plan)
    text = re.sub(r"</?span[^>]*>|<wbr>", "", report_of(build))
    assert f">{name}</th>" not in text and "not asked for: 1." in text


# --- images -------------------------------------------------------------------------------------------------------


def test_no_pictures(build):
    edit(build, "compare", pictures=[])
    assert "compare.shown is 0" in text_of(report_of(build))


def test_the_difference_of_dense_and_slim_is_beside_them_and_its_factor_is_named(tmp_path):
    folder = fake_build(tmp_path, pictures=2)
    flat = np.full((64, 64, 3), 100, dtype=np.uint8)
    for number, step in enumerate((20, 5)):
        off = flat.copy()
        off[0, 0, 1] -= step
        Image.fromarray(flat).save(folder / build_folder.IMAGES / f"{number:02d}-dense.png")
        Image.fromarray(off).save(folder / build_folder.IMAGES / f"{number:02d}-slim.png")
    pages = report_of(folder)
    assert pages.count("difference, dense to slim, \u00d78: ") == 2 and "made 8 times as bright" in pages
    encoded = re.findall(r'data:image/png;base64,([^"]+)"[^>]*alt="difference', pages)
    for uri, step in zip(encoded, (20, 5), strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))))
        assert shown[0, 0].tolist() == [0, 8 * step, 0] and shown.sum() == 8 * step
    Image.fromarray(flat).save(folder / build_folder.IMAGES / "01-slim.png")
    assert "no difference: " in report_of(folder)


def test_large_images_are_embedded_smaller(tmp_path):
    folder = fake_build(tmp_path, pictures=1, pixels=64)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / build_folder.IMAGES / "00-dense.png")
    page = report_of(folder)
    assert "data:image/webp;base64," in page and "embedded here as WebP" in page


def test_missing_image_is_told(build):
    (build / build_folder.IMAGES / "00-slim.png").unlink()
    with pytest.raises(InputError, match=r"00-slim.png .*--force compare"):
        write_report(build, build / "report.html")
    assert not list(build.glob("*report.html*"))
