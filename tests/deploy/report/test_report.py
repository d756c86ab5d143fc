"""The report of a build, from a folder as a build leaves it."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.artifacts import build_folder, numbers
from deploy.report.page import gate_bound, gate_value, write_report
from deploy.report.plots import Scale, linear_scale, log_scale
from slimdiff.embedded.scenes import render, sample_scenes
from slimdiff.errors import InputError

SKIPPED = {"skipped": "no backend is installed: pip install 'slimdiff[tensorrt-rtx]'"}
GROUPS = {"query_key": 32, "value_output": 32, "feed_forward": 512}


def unet_blocks(down: int = 2, up: int = 3, deep: int = 1) -> list[str]:
    """Transformer blocks as a UNet names them."""
    places = [f"down_blocks.{i}.attentions.{a}" for i in range(down) for a in range(2 if deep > 1 else 1)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{i}.attentions.{a}" for i in range(up) for a in range(3 if deep > 1 else 1)]
    return [f"{place}.transformer_blocks.{b}" for place in places for b in range(deep)]


def fake_sites(blocks: list[str]) -> dict[str, dict]:
    """Five sites a block, with the ranks and errors that a plan could have."""
    random = np.random.default_rng(0)
    sites = {}
    for block in blocks:
        for module, groups in (("attn1", 2), ("attn2", 2), ("ff", 1)):
            kept = float(random.uniform(0.25, 1.0))
            for group in list(GROUPS)[:2] if groups == 2 else ["feed_forward"]:
                dense = GROUPS[group]
                path = f"{block}.{module}"
                local, sensitivity = 10 ** random.uniform(-6, -2), 10 ** random.uniform(-4, 0)
                sites[f"{path}.{group}"] = {
                    "group": group,
                    "path": path,
                    "heads": 1 if group == "feed_forward" else 8,
                    "dense_rank": dense,
                    "rank": max(8, round(kept * dense / 8) * 8),
                    "cost": 1536,
                    "local_error": local,
                    "sensitivity": sensitivity,
                    "predicted_error": local * sensitivity,
                }
    return sites


def save_pictures(folder: Path, count: int, pixels: int) -> list[dict]:
    """Images of scenes, slim ones a little off, and what compare.json says of them."""
    scenes = sample_scenes(count, 5, held_out=True)
    tensors = render(scenes, 7)
    (folder / build_folder.IMAGES).mkdir(parents=True)
    random, pictures = np.random.default_rng(1), []
    for i, (scene, tensor) in enumerate(zip(scenes, tensors, strict=True)):
        array = ((tensor.permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
        picture: dict = {"caption": scene.caption(), "seed": 10_000 + i}
        for key, noise in (("dense", 0), ("slim", 6), ("slim_onnx", 6)):
            image = Image.fromarray((array + random.normal(0, 1, array.shape) * noise).clip(0, 255).astype("uint8"))
            name = f"{build_folder.IMAGES}/{i:02d}-{key}.png"
            image.resize((pixels, pixels), Image.Resampling.BICUBIC).save(folder / name)
            picture[key] = name
        pictures.append(picture)
    return pictures


def fake_build(folder: Path, blocks: list[str] | None = None, pictures: int = 4, pixels: int = 64) -> Path:
    """A folder as a build leaves it when all stages but the report are done."""
    sites = fake_sites(blocks or unet_blocks())
    timesteps = list(range(961, 0, -40))
    by_timestep = [[t, 4e-5 + 6e-3 * math.exp(-t / 90) + 2e-4 * math.sin(t) ** 2] for t in timesteps]
    sampling = {"steps": 25, "guidance": 4.0, "batch": 8, "seed": 10_000, "height": None, "width": None}
    checks = [
        {"tensor": f"out_sample@t={t}", "metric": metric, "value": value, "bound": bound, "passed": True}
        for t in (961, 641, 321, 1)
        for metric, value, bound in (
            ("finite", 0, 0),
            ("cosine", 1 - t * 1e-11, 0.99999),
            ("relative_l2", t * 2e-9, 1e-4),
        )
    ]
    parts = [
        {"name": f"{who} in ONNX Runtime against {who} in torch", "precision": "fp32", "passed": True, "checks": checks}
        for who in ("slim", "dense")
    ]
    attention = sorted({s["path"] for s in sites.values() if s["heads"] > 1})
    speed = {"median": 1.187, "low": 1.164, "high": 1.209}
    parameters = {"dense": 5_923_844, "slim": 5_213_060, "budget": 5_212_983}
    results: dict[str, dict] = {
        "build": {
            "schema": 1,
            "name": "demo",
            "model": "demo",
            "sentence": "slimdiff took 12.0 % of the UNet's parameters out of the embedded model by closed-form "
            "decompositions at 30 sites, exported it to ONNX and held it against the dense model.",
            "verdict": "pass",
            "exit_code": 0,
            "gates": [
                _gate("parity", "Parity of the exported slim model", True, True, "true", "", "24 of 24 checks hold"),
                _gate("speedup", "Speedup over dense", 1.187, 1.05, "higher", "x", "95 % interval 1.164 to 1.209"),
                _gate(
                    "quality_loss",
                    "Loss of caption accuracy",
                    0.35,
                    1.0,
                    "lower",
                    "points",
                    "93.2 % dense, 92.9 % slim",
                ),
                _gate("noise_error", "Noise-prediction error", 5.7e-4, 5e-3, "lower", "", "on the dense trajectory"),
            ],
            "figures": {
                "parameters": {"dense": 5_923_844, "slim": 5_213_060},
                "macs": {"dense": 412_876_800, "slim": 371_195_904},
                "bytes": {"dense": 23_716_904, "slim": 20_873_768},
                "latency_ms": {"dense": 18.42, "slim": 15.51},
            },
            "stages": [
                {"name": name, "key": f"{i:x}c0ffee" * 8, "seconds": seconds, "reused": i < 2}
                for i, (name, seconds) in enumerate(
                    zip(build_folder.STAGES[:-1], (41.2, 31.6, 2.2, 1.9, 28.4, 11.0, 3.1, 96.4, 7.7), strict=True)
                )
            ],
            "seconds": 223.5,
            "versions": {"slimdiff": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.31.1"},
            "machine": {
                "system": "Linux x86_64",
                "processor": "AMD EPYC 9R14",
                "cpus": 2,
                "memory_gib": 7.6,
                "gpus": [],
            },
            "made_from": {"recipe": "ab12" * 16, "model": "cd34" * 16, "prompts": "ef56" * 16},
            "recipe": {
                "model": "demo",
                "budget": {"reduce": "12%"},
                "gates": {"min_speedup": 1.05, "min_psnr_db": None},
            },
        },
        "calibrate": {"prompts": 48, "prompts_from": "embedded", "calls": 960, "sampling": sampling, "seconds": 41.2},
        "sensitivity": {"sensitivities": {}, "macs": {}},
        "plan": {
            "schema_version": 1,
            "model_class": "UNet2DConditionModel",
            "model_hash": "cd34" * 16,
            "allocation": "global",
            "align": 8,
            "parameters": parameters,
            "sites": sites,
            "left_dense": [
                {"site": "mid_block.attentions.1.attn1", "reason": "its processor is not a stock one: IPAdapter"}
            ],
            "calibration": {},
        },
        "slim": {"parameters": parameters, "sites": len(sites), "left_dense": []},
        "export": {
            "precision": "fp32",
            "dense": {
                "folder": "export/dense",
                "bytes": 23_912_111,
                "inputs": {"sample": [2, 4, 16, 16]},
                "seconds": 14.0,
            },
            "slim": {
                "folder": "export/slim",
                "bytes": 21_068_975,
                "inputs": {"sample": [2, 4, 16, 16]},
                "seconds": 13.1,
            },
        },
        "engine": {
            "backend": "tensorrt-rtx",
            "version": "1.7.1.116",
            "targets": ["sm89", "sm120"],
            "bytes": 11_534_336,
            "seconds": 9.3,
            "inputs": [
                {"name": "sample", "shape": [2, 4, 16, 16], "dtype": "float16"},
                _tensor("timestep", [], "int64"),
            ],
            "outputs": [_tensor("out_sample", [2, 4, 16, 16], "float16")],
            "layers": 1204,
            "attention": [
                {"module": m, "heads": 8, "query_key_dim": 24, "value_dim": 24, "queries": 256, "keys": 77}
                for m in attention
            ],
            "fused_attention": {"calls": len(attention), "kernels": 3},
            "sites": [{"site": s, "path": s, "expected": {}, "found": {}, "ok": True} for s in sites],
        },
        "validate": {
            "passed": True,
            "precision": "fp32",
            "checks": checks * 2,
            "first_diverging": None,
            "calls": 4,
            "timesteps": [961, 641, 321, 1],
            "parts": parts,
        },
        "compare": {
            "noise_error": {"relative_mse": 5.7e-4, "by_timestep": by_timestep},
            "images": {"psnr_db": 31.42, "ssim": 0.9713, "count": 16},
            "images_onnx": {"psnr_db": 98.7, "ssim": 0.9999998, "count": pictures},
            "quality": {
                "caption_accuracy": {
                    "dense": 0.9322,
                    "slim": 0.9287,
                    "unit": "share",
                    "better": "higher",
                    "count": 500,
                },
                "frechet_distance": {"dense": 1.213, "slim": 1.302, "unit": "", "better": "lower", "count": 500},
            },
            "sampling": sampling,
            "pictures": save_pictures(folder, pictures, pixels),
        },
        "bench": {
            "verdict": "pass",
            "gate": "speedup>=1.05",
            "speedup": speed,
            "baseline": {"median_ms": 18.42, "p90_ms": 19.80},
            "candidate": {"median_ms": 15.51, "p90_ms": 16.92},
            "runtime": "ONNX Runtime 1.31.1, CPU, fp32",
            "machine": "AMD EPYC 9R14, 2 cores, 8 GiB",
            "process_pairs": 6,
        },
    }
    for stage, result in results.items():
        save(folder, stage, result)
    return folder


def _gate(gate: str, name: str, value, bound, better: str, unit: str, detail: str) -> dict:
    return {
        "gate": gate,
        "name": name,
        "value": value,
        "bound": bound,
        "better": better,
        "unit": unit,
        "verdict": "pass",
        "detail": detail,
    }


def _tensor(name: str, shape: list[int], dtype: str) -> dict:
    return {"name": name, "shape": shape, "dtype": dtype}


def save(folder: Path, stage: str, result: dict) -> None:
    file = folder / build_folder.result_file(stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")


def edit(folder: Path, stage: str, **changes) -> None:
    save(folder, stage, {**build_folder.read(folder, stage), **changes})


def report_of(folder: Path) -> str:
    write_report(folder, folder / "report" / "report.html")
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a person reads, as one line."""
    body = re.sub(r"<(style|title)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


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


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return fake_build(tmp_path / "build", pictures=2)


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
    assert "compression ratio" not in text.lower()


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


def test_report_needs_nothing_else(build):
    elements = Elements(report_of(build)).found
    images = [a["src"] for tag, a in elements if tag == "img"]
    assert len(images) == 6 and all(src and src.startswith("data:image/png;base64,") for src in images)
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


@pytest.mark.parametrize("stage", ["engine", "validate", "bench"])
def test_skipped_stage_says_why(build, stage):
    save(build, stage, SKIPPED)
    assert SKIPPED["skipped"] in text_of(report_of(build))


def test_no_latency(build):
    result = build_folder.read(build, "build")
    result["figures"]["latency_ms"] = None
    save(build, "build", result)
    save(build, "bench", SKIPPED)
    assert "not measured" in text_of(report_of(build))


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
    assert page.count("<img") == 4


def test_no_pictures(build):
    edit(build, "compare", pictures=[])
    assert "compare.shown is 0" in text_of(report_of(build))


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.21e-5, "3.2e-5"),
        (0.00571, "0.00571"),
        (12.345, "12.3"),
        (1234.4, "1234"),
        (-0.5, "\u22120.500"),
        (2.5e7, "2.5e7"),
        (9.996, "10.0"),
    ],
)
def test_digits(value, text):
    assert numbers.digits(value) == text


def test_numbers_have_units_and_true_signs():
    assert numbers.scaled(859_520_964) == "859.5\u00a0M"
    assert numbers.scaled(999) == "999"
    assert numbers.in_bytes(3_438_083_856) == "3.438\u00a0GB"
    assert numbers.change(-0.12) == "\u221212.0\u00a0%" and numbers.change(-1e-5) == "0.0\u00a0%"
    assert numbers.duration(204) == "3\u00a0min 24\u00a0s" and numbers.duration(3725) == "1\u00a0h 02\u00a0min"
    assert numbers.duration(59.97) == "1\u00a0min 00\u00a0s"
    assert numbers.measured(0.99999998) == "0.99999998" and numbers.measured(1.0) == "1.00"
    assert numbers.measured(None) == "\u2013" and numbers.measured([2, 4]) == "2 \u00d7 4"


def test_gates_are_said_with_their_unit():
    speedup = {"gate": "speedup", "value": 1.187, "bound": 1.05, "better": "higher", "unit": "x", "verdict": "pass"}
    assert gate_value(speedup) == "1.19\u00d7" and gate_bound(speedup) == "\u2265\u00a01.05\u00d7"
    psnr = {"gate": "psnr_db", "value": None, "bound": 30, "better": "higher", "unit": "dB", "verdict": "pass"}
    assert gate_value(psnr) == "identical"
    assert gate_value(speedup | {"value": None, "verdict": "inconclusive"}) == "not measured"


def test_scales():
    decades = log_scale([None, 0.0, 3e-5, 2e-3])
    assert decades == Scale(1e-5, 1e-2, logarithmic=True)
    assert decades.at(1e-5) == 0 and decades.at(1e-2) == 100
    assert [t.label for t in decades.ticks()] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert log_scale([None, 0.0]) is None
    assert [t.label for t in Scale(0, 1000).ticks()] == ["0", "200", "400", "600", "800", "1000"]
    assert [t.label for t in log_scale([0.02, 0.05]).ticks()] == ["0.01", "0.02", "0.05", "0.1"]
    assert linear_scale([1.0, 1.0]).at(1.0) == 50
