"""A LoRA of the dense model on the slim one: the same rank, loadable by diffusers, close to fusing it first."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from conftest import PROMPTS, SAMPLING, tiny_pipeline
from families.family import TWO_LEVELS
from families.images import xl
from loras import kohya, peft_layout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from slimdiff import Budget, CalibrationSettings, InputError, PlanSettings, compress, convert_lora, save_maps
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.conversion import conversion_error
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence
from slimdiff.loading.loras import fuse_loras
from slimdiff.settings import Forms, Lora
from slimdiff.slimming.map_file import MAPS

pytest.importorskip("peft", reason="diffusers loads LoRA by peft")
CALIBRATION = CalibrationSettings(samples=3, sampling=SAMPLING)


def usual(path):
    """Layers that trainers update."""
    return ("attn" in path and "to_" in path) or "ff.net" in path or "proj_" in path


def everything(path):
    return "norm" not in path and "embedding" not in path


def make_folders(root, dense, **planning):
    """`dense` and `slim` in a folder, an eighth of all parameters gone."""
    settings = PlanSettings(align=4, allocation="uniform", fitting_calls=8, **planning)
    made = compress(dense, PROMPTS, Budget("12%"), calibration=CALIBRATION, planning=settings)
    dense.save_pretrained(root / "dense")
    made.pipeline.save_pretrained(root / "slim")
    save_maps(root / "slim", made.maps, made.pipeline.unet)
    return root


def small():
    return tiny_pipeline(**TWO_LEVELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("models"), small(), groups=tuple(GROUPS))


def check_errors(folders, dense, sizes):
    """Errors fall with the LoRA: that of the converted one against the slimmed fused model, and against the dense."""
    found, converted = [], folders / "converted.safetensors"
    for size in sizes:
        file = folders / f"{size}.safetensors"
        peft_layout(dense, file, usual, size=size)
        convert_lora(file, folders / "slim").save(converted)
        found.append(conversion_error(converted, file, folders / "slim", folders / "dense", PROMPTS, CALIBRATION))
    large, little = found
    assert large["between"] < 0.5 * large["lora"]
    assert large["converted"] < 0.5 * (large["lora"] + large["slim_of_fused"])
    assert little["lora"] < 0.5 * large["lora"] and little["between"] < 0.5 * large["between"]
    assert little["converted"] < 1.3 * little["slim_of_fused"]  # what is left is what slimming costs
    assert all(0 < value < 1 for errors in found for value in errors.values())


def test_the_smaller_the_lora_the_closer_it_is_to_slimming_with_it(folders):
    check_errors(folders, small(), (0.03, 0.003))


@pytest.mark.slow
def test_so_it_is_in_a_model_like_sdxl(tmp_path):
    check_errors(make_folders(tmp_path, xl()), xl(), (0.01, 0.001))


def test_every_layer_keeps_its_rank_and_diffusers_loads_it(folders, tmp_path):
    """Convolutions, embeddings and the text encoder too; alphas are in the matrices."""
    from slimdiff import load_pipeline

    deltas = kohya(small(), tmp_path / "style.safetensors", everything, ("unet",), dtype=torch.float16)
    result = convert_lora(tmp_path / "style.safetensors", folders / "slim")
    result.save(tmp_path / "converted.safetensors")
    assert len(result.converted) + len(result.unchanged) == len(deltas)
    assert any(path.endswith("conv2") for path in result.converted)
    assert any(path.endswith("time_emb_proj") for path in result.converted)
    state, slim = load_file(tmp_path / "converted.safetensors"), load_pipeline(folders / "slim")
    ranks = [len(tensor) for tensor in load_file(tmp_path / "style.safetensors").values() if tensor.ndim > 1]
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert sum(min(t.shape[:2]) for t in state.values()) == sum(
        min(t.shape[:2]) for t in load_file(tmp_path / "style.safetensors").values() if t.ndim > 1
    )
    assert len(ranks) == len(state)
    unchanged = next(path for path in result.unchanged if path.endswith("conv1"))
    slim.load_lora_weights(str(tmp_path / "converted.safetensors"), adapter_name="style")
    slim.fuse_lora()
    slim.unload_lora_weights()
    before = load_pipeline(folders / "slim")
    path = unchanged.removeprefix("unet.")
    moved = slim.unet.get_submodule(path).weight - before.unet.get_submodule(path).weight
    assert (moved - deltas["unet", path]).abs().max() < 1e-2
    assert weights_hash(slim.unet) != weights_hash(before.unet)


def test_a_text_encoder_s_part_passes_through(folders, tmp_path):
    from slimdiff import load_pipeline

    deltas = kohya(small(), tmp_path / "a.safetensors", lambda path: "attn" in path)
    convert_lora(tmp_path / "a.safetensors", folders / "slim").save(tmp_path / "b.safetensors")
    before, after = (
        load_pipeline(folders / "slim"),
        load_pipeline(folders / "slim", lora=[f"{tmp_path}/b.safetensors"]),
    )
    own = [(path, delta) for (component, path), delta in deltas.items() if component == "text_encoder"]
    assert own
    for path, delta in own:
        moved = after.text_encoder.get_submodule(path).weight - before.text_encoder.get_submodule(path).weight
        assert (moved - delta).abs().max() < 1e-5


@pytest.mark.parametrize("group", ("query_key", "value_output", "feed_forward"))
def test_at_full_rank_the_bases_cancel(group, pipeline, compression):
    """The converted updates of a pair of layers make the product that the updates make."""
    path = "mid_block.attentions.0.transformer_blocks.0"
    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == group and s.path.startswith(path))
    kind, module = GROUPS[group], pipeline.unet.get_submodule(site.path)
    evidence = Evidence(module, site, compression.statistics, Forms(constant=False))
    maps = kind.maps(evidence, site.dense_rank, kind.factor(evidence))
    noise, width = torch.Generator().manual_seed(0), site.heads * site.dense_rank
    one, other = (torch.randn(width, 4, generator=noise, dtype=torch.float64) for _ in range(2))
    if group == "query_key":
        left, right = (maps[path].update(m, torch.zeros(4, 1))[0] for path, m in (("to_q", one), ("to_k", other)))
    else:
        first, last = ("to_v", "to_out.0") if group == "value_output" else ("net.0.proj", "net.2")
        rows = torch.cat([one, one]) if group == "feed_forward" else one  # of values and of gates
        left = maps[first].update(rows, torch.zeros(4, 1))[0][:width]
        right = maps[last].update(torch.zeros(1, 4), other.T)[1].T
    assert (left.T @ right - one.T @ other).abs().max() < 1e-4


def test_a_compression_in_memory_is_converted_onto_and_stays_as_it_was(compression, tmp_path):
    slim = copy.deepcopy(compression)
    before = weights_hash(slim.pipeline.unet), [p.requires_grad for p in slim.pipeline.text_encoder.parameters()]
    peft_layout(tiny_pipeline(), tmp_path / "a.safetensors", usual, ("unet", "text_encoder"))
    result = convert_lora(tmp_path / "a.safetensors", slim)
    assert result.converted and before == (
        weights_hash(slim.pipeline.unet),
        [p.requires_grad for p in slim.pipeline.text_encoder.parameters()],
    )
    result.save(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as opened:
        about = json.loads(opened.metadata()["slimdiff"])
    assert about["slim"] == before[0] and about["dense"] == compression.plan.model_hash
    assert about["lora"]["file"] == "a.safetensors" and str(tmp_path) not in json.dumps(about)
    fuse_loras(slim.pipeline, [Lora(file=f"{tmp_path}/b.safetensors", scale=0.5)])
    assert weights_hash(slim.pipeline.unet) != before[0]


def test_what_cannot_be_converted_is_refused_in_one_line(folders, compression, tmp_path):
    slim, files = folders / "slim", {}
    peft_layout(small(), tmp_path / "good.safetensors", usual)
    peft_layout(xl(), tmp_path / "xl.safetensors", usual)
    for name in ("good", "xl"):
        files[name] = tmp_path / f"{name}.safetensors"
    convert_lora(files["good"], slim).save(tmp_path / "done.safetensors")
    source = small()
    peft = pytest.importorskip("peft")
    target = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    source.unet.add_adapter(peft.LoraConfig(r=2, target_modules=[target], use_dora=True), "d")
    state = peft.utils.get_peft_model_state_dict(source.unet, adapter_name="d")
    source.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="dora.safetensors")
    shutil.copytree(slim, tmp_path / "bare", ignore=shutil.ignore_patterns(MAPS))
    for file, onto, reason in (
        (files["xl"], slim, "does not fit this StableDiffusionPipeline|belong to no layer"),
        (tmp_path / "done.safetensors", slim, "was converted for a slim model already"),
        (tmp_path / "dora.safetensors", slim, "is a DoRA"),
        (files["good"], folders / "dense", "is a dense model, which takes the LoRA as it is"),
        (files["good"], tmp_path / "bare", "has no slim_maps.safetensors.*compress the dense model again"),
        (tmp_path / "gone.safetensors", slim, "there is no such file"),
    ):
        with pytest.raises(InputError, match=reason):
            convert_lora(file, onto)
    tiny_pipeline().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="was not made of"):
        conversion_error(tmp_path / "done.safetensors", files["good"], slim, tmp_path / "other", PROMPTS, CALIBRATION)
    with pytest.raises(InputError, match="was converted for another slim model"):
        fuse_loras(copy.copy(compression.pipeline), [Lora(file=f"{tmp_path}/done.safetensors")])


def test_a_dense_lora_on_a_slim_model_names_the_conversion(compression, tmp_path):
    peft_layout(tiny_pipeline(), tmp_path / "a.safetensors", usual)
    slim = copy.deepcopy(compression.pipeline)
    with pytest.raises(InputError, match="convert it with slimdiff lora"):
        fuse_loras(slim, [Lora(file=f"{tmp_path}/a.safetensors")])
    assert isinstance(slim.unet.conv_in, nn.Conv2d)
