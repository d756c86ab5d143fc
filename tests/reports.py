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
