"""The page as a whole: nothing beside it is needed, every element is closed, every text escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from reports import SKIPPED, edit, report_of, save, text_of

from deploy.artifacts import build_folder
from deploy.report.page import write_sweep_page


class Elements(HTMLParser):
    """Every start tag, and whether elements are closed in the order in which they were opened."""

    VOID = ("meta", "img", "link", "br", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(page)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_report_shows_every_part(build):
    page = report_of(build)
    text = text_of(page)
    assert "Passed: every gate holds" in text
    assert build_folder.read(build, "build")["sentence"] in text
    for shown in ("5.924 M", "5.213 M", "\u221212.0 %", "412.9 M", "23.72 MB", "18.4 ms", "15.5 ms"):
        assert shown in text, shown
    assert "95 % interval \u221217.3 % to \u221214.1 %" in text  # 1/1.209 - 1, 1/1.164 - 1
    assert "31.4 dB" in text and "93.2 %" in text and "\u22120.35 points" in text
    assert "its processor is not a stock one" in text
    assert "12 of 12 attention modules, 3 distinct kernels" in text and "30 of 30 checks against the plan hold" in text
    assert "256 \u00d7 77" in text and "built-in" not in text
    assert "1.187\u00d7" in text and "reduce: 12%" in text
    assert "multiply-accumulates of the denoiser per sample" in text
    assert "One denoiser call of 2 samples, dense and slim in turn" in text
    assert "compression ratio" not in text.lower()


def test_report_needs_nothing_else(build):
    elements = Elements(report_of(build)).found
    images = [a["src"] for tag, a in elements if tag == "img"]
    assert len(images) == 8 and all(src and src.startswith("data:image/png;base64,") for src in images)
    assert not [tag for tag, _ in elements if tag in ("script", "link", "iframe", "object", "embed")]
    links = [a[key] for _, a in elements for key in ("href", "src", "srcset", "xlink:href", "action") if key in a]
    assert all(link and link.startswith(("#", "data:")) for link in links)
    assert "@import" not in report_of(build) and "url(" not in report_of(build)


def test_elements_are_closed_and_ids_are_met(build):
    elements = Elements(report_of(build))
    assert not elements.wrong
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for tag, a in elements.found if tag == "a"} <= set(ids)


def test_text_is_escaped(build):
    hostile = "</title><script>alert(1)</script> \" onerror='x' & {{ 7*7 }} <b>"
    compare = build_folder.read(build, "compare")
    compare["pictures"][0]["caption"] = hostile
    save(build, "compare", compare)
    edit(build, "build", name=hostile, sentence=hostile, recipe={"prompts": [hostile]})
    edit(build, "engine", skipped=hostile)
    page = report_of(build)
    assert "<script" not in page and " onerror='" not in re.sub(r">[^<]*<", "><", page)
    assert hostile in text_of(page)
    assert not Elements(page).wrong


def test_a_skipped_engine_says_why(build):
    save(build, "engine", SKIPPED)
    assert SKIPPED["skipped"] in text_of(report_of(build))


def test_optional_parts_may_be_absent(build):
    compare = build_folder.read(build, "compare")
    compare |= {"images_onnx": None, "quality": {}, "images": {"psnr_db": None, "ssim": 1.0, "count": 2}}
    compare["noise_error"] = {"relative_mse": 0.0, "by_timestep": [[961, 0.0], [1, 0.0]]}
    for picture in compare["pictures"]:
        picture["slim_onnx"] = None
    save(build, "compare", compare)
    plan = build_folder.read(build, "plan")
    for site in plan["sites"].values():
        site |= {"sensitivity": None, "predicted_error": None}
    save(build, "plan", plan | {"left_dense": []})
    edit(build, "build", gates=[])
    page = report_of(build)
    text = text_of(page)
    for said in ("identical", "no evaluator", "No gate was set", "the error is zero", "local error"):
        assert said in text, said
    assert "slim, ONNX Runtime" not in text and "Left dense" not in text
    assert page.count("<img") == 6


def test_metrics_are_shown_with_their_intervals(build):
    compare = build_folder.read(build, "compare")
    about = {"unit": "", "better": "lower", "count": 24}
    compare["images"]["metrics"] = {"lpips": {"value": 0.123, "low": 0.101, "high": 0.145, **about}}
    clip = {"dense": 31.0, "slim": 30.5, "difference": -0.5, "low": -0.81, "high": -0.19, "intervals": {}}
    compare["quality"]["clip"] = {**clip, **about, "better": "higher"}
    compare["quality"]["caption_accuracy"] |= {"low": -0.02, "high": 0.005, "intervals": {}}
    save(build, "compare", compare)
    page = report_of(build)
    text = text_of(page)
    for said in ("LPIPS lower is better", "0.123", "0.101 to 0.145", "CLIP score", "0.810 to", "−2.00 to +0.50 points"):
        assert said in text, said
    assert not Elements(page).wrong


def test_figures_that_seem_to_disagree_are_explained_where_they_stand(build):
    plan = build_folder.read(build, "plan")
    for number, site in enumerate(plan["sites"].values()):
        site["predicted_error"] = 3e-5 if number == 0 else 0.0
    save(build, "plan", plan)
    edit(build, "bench", confidence=0.994, hints=["87% of the runs lost their core to other work"])
    text = text_of(report_of(build))
    assert "The plan predicted 3" in text
    assert "errors add up differently" in text
    assert "own level is 99.4 %" in text and "87% of the runs lost their core" in text


def test_no_cell_is_empty_and_what_is_absent_says_why(build):
    compare = build_folder.read(build, "compare")
    compare |= {"images_onnx": None, "pictures": []}
    compare["quality"]["frechet_distance"]["slim"] = None
    save(build, "compare", compare)
    plan = build_folder.read(build, "plan") | {"allocation": "uniform"}
    for site in plan["sites"].values():
        site |= {"sensitivity": None, "predicted_error": None}
    save(build, "plan", plan)
    engine = build_folder.read(build, "engine")
    edit(build, "engine", fused_attention=None, layers=None, attention=[{"module": engine["attention"][0]["module"]}])
    build_json = build_folder.read(build, "build")
    edit(build, "build", made_from=build_json["made_from"] | {"prompts": None})
    sweep = {"model": "m", "by": "macs", "runtime": "torch", "machine": "a machine", "dense": SIZES, "points": [POINT]}
    write_sweep_page(sweep, build / "sweep.html")
    pages = [report_of(build), (build / "sweep.html").read_text(encoding="utf-8")]
    cells = [text_of(cell) for page in pages for cell in re.findall(r"<(?:td|th|dd)\b.*?</(?:td|th|dd)>", page, re.S)]
    drawn = [
        cell for page in pages for cell in re.findall(r"<td><span class=\"track.*?</td>|<dd class=\"bar.*?</dd>", page)
    ]
    assert len(cells) > 300 and cells.count("") == sum(text_of(cell) == "" for cell in drawn)  # a bar has no text
    assert not {"–", "-", "None", "null", "nan"} & set(cells)
    text = " ".join(text_of(page) for page in pages)
    for said in (
        "not run: the recipe keeps no images",
        "a score is undefined",
        "allocation uniform does without",
        "not counted by this backend",
        "no images asked for",
    ):
        assert said in text, said


SIZES = {"parameters": 10, "macs": 100, "bytes": 40}
POINT = {
    "budget": "10%",
    **SIZES,
    "latency_ms": 9.0,
    "dense_latency_ms": 10.0,
    "speedup": {"median": 1.1, "low": 1.0, "high": 1.2},
    "noise_error": None,
    "images": None,
}


def test_the_head_says_when_by_what_and_where_it_was_made(build):
    assert "at a time that was not kept by slimdiff 0.1.0 (no git commit is known of it)" in text_of(report_of(build))
    edit(build, "build", time="2026-11-26T04:09:24+00:00", commit="0123456789ab-dirty")
    head = text_of(report_of(build)).partition("Figures")[0]
    assert "Made 2026-11-26 04:09 UTC by slimdiff 0.1.0, git commit 0123456789ab-dirty" in head
    assert "on AMD EPYC 9R14, 2 cores, 7.6 GiB, no GPU" in head
    sweep = {"model": "m", "by": "macs", "runtime": "torch", "machine": "a machine", "dense": SIZES, "points": [POINT]}
    write_sweep_page(sweep | {"time": "2026-11-26T04:09:24+00:00", "versions": {"slimdiff": "9"}}, build / "x.html")
    head = text_of((build / "x.html").read_text(encoding="utf-8"))
    assert "Made 2026-11-26 04:09 UTC by slimdiff 9 (no git commit is known of it), on a machine." in head
