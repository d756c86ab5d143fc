"""A folder as a build leaves it when all stages but the report are done, and what a person reads in the report."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.artifacts import build_folder
from deploy.report.page import write_report
from slimdiff.embedded.scenes import render, sample_scenes

SKIPPED = {"skipped": "no backend is installed: pip install 'slimdiff[tensorrt-rtx]'"}
GROUPS = {"query_key": 32, "value_output": 32, "feed_forward": 512}
STAGE_SECONDS = (41.2, 31.6, 2.2, 1.9, 28.4, 11.0, 3.1, 96.4, 7.7)
"""Of every stage but the report."""


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


def fake_checks() -> list[dict]:
    """Three metrics of the output at four times, all within their bounds."""
    return [
        {"tensor": f"out_sample@t={t}", "metric": metric, "value": value, "bound": bound, "passed": True}
        for t in (961, 641, 321, 1)
        for metric, value, bound in (
            ("finite", 0, 0),
            ("cosine", 1 - t * 1e-11, 0.99999),
            ("relative_l2", t * 2e-9, 1e-4),
        )
    ]


def fake_build(folder: Path, blocks: list[str] | None = None, pictures: int = 4, pixels: int = 64) -> Path:
    """A folder as a build leaves it when all stages but the report are done.

    `reports.json` beside this file has the results by stage, but for what follows from the sites, times and pictures.
    """
    results: dict[str, dict] = json.loads(Path(__file__).with_name("reports.json").read_text(encoding="utf-8"))
    results["build"]["stages"] = [
        {"name": name, "key": f"{i:x}c0ffee" * 8, "seconds": seconds, "reused": i < 2}
        for i, (name, seconds) in enumerate(zip(build_folder.STAGES[:-1], STAGE_SECONDS, strict=True))
    ]
    sites = fake_sites(blocks or unet_blocks())
    results["plan"]["sites"], results["slim"]["sites"] = sites, len(sites)
    attention = sorted({s["path"] for s in sites.values() if s["heads"] > 1})
    sizes = {"heads": 8, "query_key_dim": 24, "value_dim": 24, "queries": 256, "keys": 77}
    results["engine"] |= {
        "attention": [{"module": module, **sizes} for module in attention],
        "fused_attention": {"calls": len(attention), "kernels": 3},
        "sites": [{"site": s, "path": s, "expected": {}, "found": {}, "ok": True} for s in sites],
    }
    checks = fake_checks()
    results["validate"]["checks"] = checks * 2
    results["validate"]["parts"] = [
        {"name": f"{who} in ONNX Runtime against {who} in torch", "precision": "fp32", "passed": True, "checks": checks}
        for who in ("slim", "dense")
    ]
    compare = results["compare"]
    compare["noise_error"]["by_timestep"] = [
        [t, 4e-5 + 6e-3 * math.exp(-t / 90) + 2e-4 * math.sin(t) ** 2] for t in range(961, 0, -40)
    ]
    compare["images_onnx"]["count"] = pictures
    compare["pictures"] = save_pictures(folder, pictures, pixels)
    for stage, result in results.items():
        save(folder, stage, result)
    return folder


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
