"""What overflows in half precision is found, named, and cured by keeping its module in single precision."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError

onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.precision import fp32_islands, paths_to_keep  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.settings import ExportSettings  # noqa: E402
from exporters.validation.divergence import graph_inputs, own_errors  # noqa: E402
from exporters.validation.fragments import OnnxFragments  # noqa: E402
from exporters.validation.overflow import explain_overflow, first_not_finite  # noqa: E402
from exporters.validation.parity import Bounds, check_calls  # noqa: E402

LAYER = "mid_block.attentions.0.transformer_blocks.0"
ONE_LEVEL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="module")
def hot(tiny):
    """Scores far beyond 65504 in one attention layer, then a feed-forward whose hidden values are, and nothing else."""
    unet = tiny.unet(**ONE_LEVEL)
    for name in ("to_q", "to_k"):
        unet.get_submodule(f"{LAYER}.attn1.{name}").weight.data *= 3000
    first, last = unet.get_submodule(f"{LAYER}.ff.net.0.proj"), unet.get_submodule(f"{LAYER}.ff.net.2")
    values = slice(None, first.weight.shape[0] // 2)
    first.weight.data[values] *= 2e5
    first.bias.data[values] *= 2e5
    last.weight.data /= 2e5
    return unet


@pytest.fixture(scope="module")
def export(hot, calls, tmp_path_factory):
    def exported(keep):
        settings = ExportSettings(precision="fp16", keep_fp32=keep)
        return export_unet(hot, tmp_path_factory.mktemp("hot"), calls[0], settings)

    return exported


@pytest.fixture(scope="module")
def plain(export):
    return export([])


@pytest.fixture(scope="module")
def half_cured(export):
    return export(["*mid_block*.attn1"])


@pytest.fixture(scope="module")
def cured(export):
    return export([f"{LAYER}.attn1", f"{LAYER}.ff"])


def test_the_first_overflow_is_named_with_what_cures_it(plain, hot, calls):
    found = explain_overflow(OnnxFragments(plain), hot, calls[0])
    assert (found["module"], found["operator"], found["node"]) == (f"{LAYER}.attn1", "MatMul", f"{LAYER}.attn1/MatMul")
    assert found["not_finite"] > 0 and 1000 < found["input_max_abs"] < 65504
    assert found["keep_fp32"] == f"{LAYER}.attn1" and f"--keep-fp32 {LAYER}.attn1" in found["advice"]


def test_one_cure_shows_the_next_overflow(half_cured, hot, calls):
    found = explain_overflow(OnnxFragments(half_cured), hot, calls[0])
    assert found["module"] == f"{LAYER}.ff.net.0.proj" and found["input_max_abs"] < 100
    # The projection gives what fp16 cannot hold, so it takes the module around it that does not.
    assert found["keep_fp32"] == f"{LAYER}.ff"


def test_modules_kept_in_fp32_cure_the_overflow(cured, hot, calls):
    fragments = OnnxFragments(cured)
    assert all(first_not_finite(fragments, call) is None for call in calls)
    # Scores so large make the softmax pick one key, and where two are nearly alike, fp16's last digit decides which.
    bounds = Bounds(cosine=0.999, relative_l2=0.03)
    candidate = UNet.open(cured, threads=1).predict
    result = check_calls(calls, lambda call: predict(hot, call), candidate, "fp16", bounds=bounds)
    assert result["passed"], result["checks"]
    assert max(e.relative_l2 for e in own_errors(fragments, hot, calls[0])) < 5e-3


def test_running_it_whole_on_the_cpu_hides_the_scores(plain, calls, hot):
    """Why every tensor is checked node by node."""
    assert not UNet.open(plain, threads=1).predict(calls[0]).isfinite().all()
    hidden = OnnxFragments(plain)
    cut = hidden.module_outputs([f"{LAYER}.attn1"])[f"{LAYER}.attn1"]
    nodes, _ = hidden.between(set(hidden.inputs), [cut])
    (after,) = hidden.run(nodes, graph_inputs(calls[0]), [cut])
    assert torch.from_numpy(after).isfinite().all()


def test_fp32_islands_are_those_intended(exported, dense, cured, hot):
    rows = fp32_islands(exported["dense-fp16"])
    norms = {p for p, m in dense.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)}
    assert {r["module"] for r in rows if r["fp32"] == "statistics"} == norms
    # The timestep's sines, to whose arguments fp16 has not the digits. Nothing else.
    assert {r["module"] for r in rows if r["fp32"] == "tensors"} == {"time_proj"}
    assert {"Sin", "Cos"} <= {r["operator"] for r in rows}
    assert fp32_islands(exported["dense"]) == []
    kept = [r for r in fp32_islands(cured) if r["fp32"] == "tensors" and r["module"] != "time_proj"]
    inside = (f"{LAYER}.attn1", f"{LAYER}.ff")
    assert all(r["module"].startswith(inside) or r["operator"] == "Split" for r in kept)
    weighted = {p for p, m in hot.named_modules() if p.startswith(inside) and isinstance(m, torch.nn.Linear)}
    assert weighted <= {r["module"] for r in kept}


def test_kept_weights_keep_their_digits(cured, hot):
    weights = {w.name: w for w in onnx.load(str(cured)).graph.initializer}
    name = f"{LAYER}.ff.net.2"
    kept = torch.from_numpy(onnx.numpy_helper.to_array(weights[f"{name}.weight_t"]).copy()).T
    assert torch.equal(kept, hot.get_submodule(name).weight)
    assert onnx.numpy_helper.to_array(weights["conv_out.weight"]).dtype == "float16"


def test_a_softmax_over_many_keys_sums_in_fp32(tiny, tmp_path):
    unet = tiny.unet(**ONE_LEVEL, sample_size=48)
    arguments = {
        "sample": torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.zeros(1, 7, 32),
    }
    call = Call(0, 501, arguments)
    file = export_unet(unet, tmp_path, call, ExportSettings(precision="fp16"))
    wide = {r["module"] for r in fp32_islands(file) if r["operator"] == "Softmax"}
    assert wide == {p for p, m in unet.named_modules() if isinstance(m, Attention) and p.endswith("attn1")}
    assert check_calls([call], lambda c: predict(unet, c), UNet.open(file, threads=1).predict, "fp16")["passed"]


def test_patterns_that_match_nothing_are_refused(hot, calls, tmp_path):
    with pytest.raises(InputError, match="attn9"):
        export_unet(hot, tmp_path, calls[0], ExportSettings(precision="fp16", keep_fp32=["*.attn9"]))
    assert paths_to_keep(hot, ["mid_block*", "*.attn1"])[0].startswith("down_blocks")
    assert "mid_block" in paths_to_keep(hot, ["mid_block*", "*.attn1"])
    assert not any(p.startswith("mid_block.") for p in paths_to_keep(hot, ["mid_block*", "*.attn1"]))


def test_sdxls_sizes_are_joined_in_half_precision(tiny, calls, tmp_path):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = tiny.unet(**ONE_LEVEL, **added, projection_class_embeddings_input_dim=6 * 8 + 16)
    conditions = {"text_embeds": torch.ones(2, 16), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 768, 768]] * 2)}
    call = Call(0, 501, {**calls[0].arguments, "added_cond_kwargs": conditions})
    file = export_unet(unet, tmp_path, call, ExportSettings(precision="fp16"))
    assert check_calls([call], lambda c: predict(unet, c), UNet.open(file, threads=1).predict, "fp16")["passed"]
    assert not unet.add_time_proj._forward_hooks
