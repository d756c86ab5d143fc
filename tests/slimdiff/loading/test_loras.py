"""LoRA files are fused as they say, or refused in one line."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from families.images import unconditional, xl
from loras import kohya, peft_layout
from safetensors.torch import load_file, save_file
from torch import nn

from slimdiff import InputError, MissingPackageError
from slimdiff.adapters import fused_files
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.loading.loras import fuse_loras
from slimdiff.settings import Lora

pytest.importorskip("peft", reason="diffusers loads LoRA by peft")
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def of_kinds(path):
    """Attention, feed-forward, projections, convolutions and embeddings: what networks for convolutions have."""
    return "norm" not in path and "token_embedding" not in path and "position_embedding" not in path


def weights(pipeline):
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {(name, path): t.clone() for name, part in parts.items() for path, t in part.state_dict().items()}


def check_fused(before, after, deltas, scale=1.0, bound=1e-5):
    """Every weight of a pipeline is what it was, plus what the LoRA says."""
    for (component, name), weight in before.items():
        delta = deltas.pop((component, name.removesuffix(".weight")), None)
        expected = weight if delta is None else weight + scale * delta
        assert after[component, name].dtype == weight.dtype
        assert (after[component, name] - expected).abs().max() <= (0 if delta is None else bound), (component, name)
    assert not deltas


@pytest.mark.parametrize("alphas", (True, False))
def test_every_layer_of_a_kohya_network_is_fused_at_its_own_alpha(fresh_pipeline, tmp_path, alphas):
    deltas = kohya(fresh_pipeline, tmp_path / "style.safetensors", of_kinds, alphas=alphas)
    before = weights(fresh_pipeline)
    kinds = {type(fresh_pipeline.unet.get_submodule(path)) for component, path in deltas if component == "unet"}
    assert kinds >= {nn.Linear, nn.Conv2d} and any(component == "text_encoder" for component, _ in deltas)
    fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "style.safetensors"), scale=0.5)])
    check_fused(before, weights(fresh_pipeline), deltas, 0.5)
    (record,) = fused_files(fresh_pipeline)
    assert (record["file"], record["scale"], len(record["sha256"])) == ("style.safetensors", 0.5, 64)


def test_layers_without_an_alpha_beside_others_have_a_scale_of_one(fresh_pipeline, tmp_path):
    deltas = kohya(fresh_pipeline, tmp_path / "a.safetensors", lambda path: "attn1" in path, ("unet",))
    state, (_, path) = load_file(tmp_path / "a.safetensors"), next(iter(deltas))
    name = "lora_unet_" + path.replace(".", "_")
    deltas["unet", path] *= 2 / float(state.pop(f"{name}.alpha"))  # its rank over its alpha
    save_file(state, tmp_path / "a.safetensors")
    before = weights(fresh_pipeline)
    fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "a.safetensors"))])
    check_fused(before, weights(fresh_pipeline), deltas)


def test_several_are_fused_one_after_another_and_the_statistics_are_theirs(fresh_pipeline, tmp_path):
    first = peft_layout(fresh_pipeline, tmp_path / "one.safetensors", lambda path: "attn" in path and "to_" in path)
    second = peft_layout(fresh_pipeline, tmp_path / "two.safetensors", lambda path: path == ATTENTION, seed=1)
    before, own_hash = weights(fresh_pipeline), weights_hash(fresh_pipeline.unet)
    loras = [f"{tmp_path}/one.safetensors:0.5", f"{tmp_path}/two.safetensors:-2"]
    fuse_loras(fresh_pipeline, [Lora.model_validate(lora) for lora in loras])
    deltas = {key: 0.5 * delta - 2 * second.get(key, torch.zeros(())) for key, delta in first.items()}
    check_fused(before, weights(fresh_pipeline), deltas)
    assert weights_hash(fresh_pipeline.unet) != own_hash
    assert [record["scale"] for record in fused_files(fresh_pipeline)] == [0.5, -2]


def test_peft_s_own_configuration_says_the_scale_and_dora_keeps_its_magnitudes(fresh_pipeline, tmp_path):
    peft = pytest.importorskip("peft")
    for use_dora in (False, True):
        source, torch_layer = copy.deepcopy(fresh_pipeline), ATTENTION
        source.unet.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=6, target_modules=[ATTENTION], init_lora_weights=False, use_dora=use_dora),
            "style",
        )
        layer = source.unet.get_submodule(torch_layer)
        delta = 1.5 * (layer.lora_B["style"].weight @ layer.lora_A["style"].weight).detach()
        expected = layer.base_layer.weight + delta
        if use_dora:
            layer.lora_magnitude_vector["style"].weight.data *= 1.25
            length = layer.lora_magnitude_vector["style"].weight / expected.norm(dim=1)
            expected = expected * length[:, None]
        source.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.utils.get_peft_model_state_dict(source.unet, adapter_name="style"),
            unet_lora_adapter_metadata=source.unet.peft_config["style"].to_dict(),
        )
        target = copy.deepcopy(fresh_pipeline)
        fuse_loras(target, [Lora(file=str(tmp_path / "pytorch_lora_weights.safetensors"))])
        torch.testing.assert_close(target.unet.get_submodule(ATTENTION).weight, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", ("sd", "xl"))
def test_names_of_the_original_code_are_read_by_what_the_unet_is(make, fresh_pipeline, tmp_path):
    pipeline = fresh_pipeline if make == "sd" else xl()
    deltas = kohya(pipeline, tmp_path / "a.safetensors", lambda path: path == ATTENTION, ("unet",))
    state = load_file(tmp_path / "a.safetensors")
    original = {n.replace("down_blocks_1_attentions_0", "input_blocks_3_1"): tensor for n, tensor in state.items()}
    assert original.keys() != state.keys()
    save_file(original, tmp_path / "a.safetensors")
    before = weights(pipeline)
    fuse_loras(pipeline, [Lora(file=str(tmp_path / "a.safetensors"))])
    check_fused(before, weights(pipeline), deltas)


def test_half_weights_are_summed_in_float32_and_stay_half(fresh_pipeline, tmp_path):
    fresh_pipeline.unet.half(), fresh_pipeline.text_encoder.to(torch.bfloat16)
    deltas = kohya(fresh_pipeline, tmp_path / "a.safetensors", of_kinds, dtype=torch.float16)
    held = load_file(tmp_path / "a.safetensors")
    before = weights(fresh_pipeline)
    fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "a.safetensors"))])
    after = weights(fresh_pipeline)
    name = "lora_unet_" + ATTENTION.replace(".", "_")
    up, down, alpha = (held[f"{name}.{part}"].float() for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    exact = before["unet", f"{ATTENTION}.weight"].float() + alpha / len(down) * up @ down
    assert torch.equal(after["unet", f"{ATTENTION}.weight"], exact.half())
    assert {key: tensor.dtype for key, tensor in before.items()} == {key: t.dtype for key, t in after.items()}
    assert any((after[key] != before[key]).any() for key in before if key[0] == "text_encoder") and deltas
    assert all(parameter.requires_grad for parameter in fresh_pipeline.unet.parameters())


A = torch.ones(4, 64)
B = torch.ones(64, 4)
LAYER = f"unet.{ATTENTION}"
WHOLE = {f"{LAYER}.lora_A.weight": A, f"{LAYER}.lora_B.weight": B}
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
REFUSED = {
    "another rank": ({**WHOLE, f"{LAYER}.lora_A.weight": torch.ones(3, 64)}, r"\[64, 4\] and \[3, 64\], whose ranks"),
    "another width": ({f"{LAYER}.lora_A.weight": torch.ones(4, 32), f"{LAYER}.lora_B.weight": B}, "does not fit"),
    "half of a layer": ({f"{LAYER}.lora_A.weight": A}, "has no up matrix"),
    "a layer that is not there": (
        WHOLE | {n.replace("down_blocks.1", "down_blocks.7"): t.clone() for n, t in WHOLE.items()},
        r"updates for unet\.down_blocks\.7.*, 1 of 2, that belong to no layer",
    ),
    "no layer that is there": (
        {n.replace("down", "double"): t for n, t in WHOLE.items()},
        "belong to no layer|could not be read",
    ),
    "PEFT's own names": ({f"base_model.model.{n[5:]}": t for n, t in WHOLE.items()}, "belong to no layer|could not"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": A, f"{KOHYA}.hada_w1_b": B}, "hada_w1_a: that is no LoRA"),
    "LoKr": ({f"{LAYER}.lokr_w1": A}, "lokr_w1: that is no LoRA"),
    "kohya's DoRA": (
        {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.dora_scale": B[:, :1].clone()},
        "kohya's DoRA is not read",
    ),
    "a bias": ({**WHOLE, f"{LAYER}.lora_B.bias": torch.ones(64)}, "bias: that is no LoRA"),
    "not finite": ({**WHOLE, f"{LAYER}.lora_B.weight": B * float("nan")}, "which is not finite"),
    "alpha in another layout": ({**WHOLE, f"{LAYER}.alpha": torch.tensor(2.0)}, "could not be read as a LoRA"),
    "alpha that is no number": (
        {f"{KOHYA}.lora_down.weight": A, f"{KOHYA}.lora_up.weight": B, f"{KOHYA}.alpha": torch.ones(2)},
        "is no number",
    ),
    "a whole model": ({"conv_in.weight": A}, "conv_in.weight: that is no LoRA"),
    "nothing": ({}, "holds no tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_names_the_file(name, fresh_pipeline, tmp_path):
    tensors, reason = REFUSED[name]
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=reason) as refused:
        fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "odd.safetensors"))])
    assert "odd.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_none_pickles_and_pipelines_without_lora_are_refused(fresh_pipeline, tmp_path):
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04")
    (tmp_path / "torn.safetensors").write_bytes(b"\x80\x04")
    peft_layout(fresh_pipeline, tmp_path / "good.safetensors", lambda path: path == ATTENTION)
    for file, reason in (
        ("gone.safetensors", "there is no such file; a LoRA is FILE"),
        ("pickle.bin", "is a pickle"),
        ("torn.safetensors", "not a whole safetensors file"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=reason):
            fuse_loras(fresh_pipeline, [Lora(file=f"{tmp_path}/{file}")])
    with pytest.raises(InputError, match="DDIMPipeline takes no LoRA"):
        fuse_loras(unconditional(), [Lora(file=f"{tmp_path}/good.safetensors")])


def test_a_part_for_a_text_encoder_that_is_not_there_is_refused(fresh_pipeline, tmp_path):
    """What SDXL's files have, and Stable Diffusion has one text encoder: diffusers would leave it out."""
    name = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {**WHOLE, f"{name}.lora_A.weight": A.clone(), f"{name}.lora_B.weight": 2 * B}, tmp_path / "xl.safetensors"
    )
    with pytest.raises(
        InputError, match=r"updates for text_encoder_2.*, 1 of 2, that belong to no layer of this Stable"
    ):
        fuse_loras(fresh_pipeline, [Lora(file=f"{tmp_path}/xl.safetensors")])


def test_weights_that_overflow_by_a_lora_are_refused(fresh_pipeline, tmp_path):
    peft_layout(fresh_pipeline, tmp_path / "huge.safetensors", lambda path: path == ATTENTION, size=1e6)
    fresh_pipeline.unet.half()
    with pytest.raises(InputError, match="that fp16 does not hold"):
        fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "huge.safetensors"))])


def test_without_peft_the_extra_is_named(fresh_pipeline, tmp_path, monkeypatch):
    peft_layout(fresh_pipeline, tmp_path / "a.safetensors", lambda path: path == ATTENTION)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"slimdiff\[lora\]"):
        fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "a.safetensors"))])


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    (
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2),
        ("odd:name:3", "odd:name", 3),
    ),
)
def test_a_number_after_the_last_colon_is_the_scale(text, file, scale):
    assert Lora.model_validate(text) == Lora(file=file, scale=scale)


@pytest.mark.parametrize("scale", ("nan", "inf", "1e9"))
def test_scales_that_are_no_scale_are_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        Lora.model_validate(f"a.safetensors:{scale}")


def test_records_are_plain(fresh_pipeline, tmp_path):
    peft_layout(fresh_pipeline, tmp_path / "a.safetensors", lambda path: path == ATTENTION)
    fuse_loras(fresh_pipeline, [Lora(file=str(tmp_path / "a.safetensors"))])
    assert str(tmp_path) not in json.dumps(fused_files(fresh_pipeline))
