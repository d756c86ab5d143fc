"""A denoiser in parts has the whole graph's nodes and weights, each once, and computes what it does."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from slimdiff.errors import InputError

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.naming import check_reduced_dims, weight_dims  # noqa: E402
from exporters.graphs.precision import fp32_islands  # noqa: E402
from exporters.graphs.reading import inputs_of, outputs_of, read_graph  # noqa: E402
from exporters.graphs.shapes import leftover_dims  # noqa: E402
from exporters.graphs.split import split_graph  # noqa: E402
from exporters.layout import PARTS, parts_of  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.settings import ExportSettings  # noqa: E402
from slimdiff.denoising.trajectory import Call, predict  # noqa: E402
from slimdiff.models import plan_of  # noqa: E402
from slimdiff.slimming.skeleton import skeleton  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory, exported) -> dict[str, Path]:
    """The folders of the exported graphs in parts."""
    folder = tmp_path_factory.mktemp("parts")
    for name, file in exported.items():
        split_graph(file, folder / name)
        shutil.copy(file.parent / "config.json", folder / name)
    return {name: folder / name for name in exported}


def error(reference, candidate) -> float:
    return float(np.linalg.norm(candidate - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("name", ["dense", "dense-open", "slim"])
def test_parts_compute_what_the_whole_graph_does(parts, exported, calls, name):
    whole, split = UNet.open(exported[name]), UNet.open(parts[name])
    assert split.inputs == whole.inputs and split.session.dtypes == whole.session.dtypes
    for call in calls:
        assert error(whole.predict(call), split.predict(call)) < 1e-6


def test_half_precision_is_as_close_to_torch_in_parts_as_whole(parts, exported, calls, dense):
    whole, split = UNet.open(exported["dense-fp16"]), UNet.open(parts["dense-fp16"])
    assert split.session.precision == "fp16"
    right = predict(dense, calls[1])
    assert error(right, split.predict(calls[1])) < 1.5 * error(right, whole.predict(calls[1])) < 5e-3


def test_an_open_batch_stays_open(parts, tiny, dense):
    unet = UNet.open(parts["dense-open"])
    for batch in (1, 3):
        call = tiny.calls(batch)[0]
        assert error(predict(dense, call), unet.predict(call)) < 1e-5


@pytest.mark.parametrize("name", ["dense", "slim"])
def test_every_weight_is_in_one_part(parts, exported, name):
    def weights(file):
        initializers = read_graph(file).graph.initializers.items()
        return Counter(
            {n: prod(w.shape.numpy()) for n, w in initializers if n.endswith(("weight", "weight_t", "bias"))}
        )

    graphs = {part: weights(folder / "model.onnx") for part, folder in parts_of(parts[name]).items()}
    assert sum(graphs.values(), Counter()) == weights(exported[name])
    assert all("attn2.to_k" in n or "attn2.to_v" in n for n in graphs["prompt"])
    assert all("time_embedding" in n or "time_emb_proj" in n for n in graphs["time"])
    assert not any("attn2.to_k" in n or "time" in n for n in graphs["step"])


def test_keys_and_values_of_a_slim_model_are_of_its_ranks(parts, slim_and_plan):
    outputs = outputs_of(read_graph(parts["slim"] / "prompt" / "model.onnx"))
    ranks = {site.path: site.heads * site.rank for site in slim_and_plan[1].sites.values() if "attn2" in site.path}
    expected = {f"{path}.{layer}": (2, 7, size) for path, size in ranks.items() for layer in ("to_k", "to_v")}
    assert {name: spec.shape for name, spec in outputs.items()} == expected


def test_parts_are_read_as_the_whole_graph(parts, exported, slim_and_plan):
    for name in ("slim", "dense-open"):
        whole, joined = read_graph(exported[name]), read_graph(parts[name])
        assert inputs_of(joined) == inputs_of(whole) and outputs_of(joined) == outputs_of(whole)
        assert weight_dims(joined) == weight_dims(whole)
    assert all(row["ok"] for row in check_reduced_dims(parts["slim"], slim_and_plan[1]))
    islands = [{row["node"] for row in fp32_islands(folder)} for folder in (exported["slim-fp16"], parts["slim-fp16"])]
    assert islands[0] == islands[1]


def test_an_export_in_parts_has_them_and_no_whole_graph(tmp_path, dense, calls):
    unet = skeleton(dense, {path: rank for path, rank in _halves(dense).items() if "attn2" in path})
    folder = export_unet(unet, tmp_path / "unet", calls[0], ExportSettings(split=True))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", *sorted(PARTS)]
    assert all(row["ok"] for row in check_reduced_dims(folder, plan_of(unet)))
    assert leftover_dims(folder, plan_of(unet)) == []


def _halves(unet):
    from slimdiff.groups import find_sites

    return {site.path: site.dense_rank // 2 for site in find_sites(unet)[0]}


def test_parts_of_two_exports_are_refused(parts, tmp_path):
    mixed = shutil.copytree(parts["dense"], tmp_path / "mixed")
    shutil.rmtree(mixed / "prompt")
    for look in (read_graph, UNet.open):
        with pytest.raises(InputError, match="not of one export: nothing gives .*attn2.to_k to the step"):
            look(mixed)
    shutil.copytree(parts["dense"] / "time", mixed / "prompt")
    with pytest.raises(InputError, match="not of one export"):
        UNet.open(mixed)


def test_what_is_no_denoiser_is_not_split(tmp_path, onnx_folder):
    with pytest.raises(InputError, match="is no UNet"):
        split_graph(onnx_folder / "text_encoder" / "model.onnx", tmp_path)


KINDS = {
    "class labels": ({"num_class_embeds": 3}, {"class_labels": torch.tensor([0, 2])}),
    "guidance embedded (LCM)": ({"time_cond_proj_dim": 16}, {"timestep_cond": torch.randn(2, 16)}),
    "added keys and values, scale and shift by time (DeepFloyd IF)": (
        {
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "encoder_hid_dim": 24,
        },
        {"encoder_hidden_states": torch.randn(2, 7, 24)},
    ),
    "an image for a prompt (Kandinsky)": (
        {"encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": torch.randn(2, 24)}},
    ),
    "sizes and a pooled text (SDXL)": (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.ones(2, 6)}},
    ),
    "cross-attention alone": ({"only_cross_attention": True}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("open_batch", [False, True])
def test_unets_of_every_kind_are_split(tmp_path, tiny, kind, open_batch):
    config, arguments = KINDS[kind]
    unet, call = tiny.unet(**config), tiny.calls()[0]
    call = replace(call, arguments=call.arguments | arguments)
    settings = ExportSettings(split=True, dynamic_batch=open_batch)
    split = UNet.open(export_unet(unet, tmp_path, call, settings))
    assert error(predict(unet, call), split.predict(call)) < 1e-5
    step = split.session.parts["step"]
    assert [name for name in step.inputs if "." not in name] == ["sample"]
    assert len(split.session.parts["prompt"].outputs) >= 8 <= len(split.session.parts["time"].outputs)


@pytest.mark.slow
@pytest.mark.parametrize("open_batch", [False, True])
def test_a_unet_without_a_prompt_has_no_part_for_it(tmp_path, open_batch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks)
    call = Call(0, 7, {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(7)})
    settings = ExportSettings(split=True, dynamic_batch=open_batch)
    split = UNet.open(export_unet(unet.eval(), tmp_path, call, settings))
    assert list(split.session.parts) == ["time", "step"] and set(split.inputs) == {"sample", "timestep"}
    assert error(predict(unet, call), split.predict(call)) < 1e-5
