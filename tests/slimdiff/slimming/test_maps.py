"""What slimming does to a weight is linear in it, and the maps that are kept say it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from families.family import TWO_LEVELS
from safetensors.torch import load_file
from torch import nn

from slimdiff import PAPERS, Budget, Forms, InputError, PlanSettings
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.compression import Compressor
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Evidence, Site
from slimdiff.settings import ResnetSettings
from slimdiff.slimming.map_file import MAPS, load_maps, save_maps

FORMS = {
    "default": Forms(),
    "without compensation": Forms(compensate="none"),
    "sequential": Forms(compensate="sequential"),
    "keys as they are": Forms(centre_keys=False, compensate="none"),
    "values": Forms(value_moments="values", compensate="none"),
    "head by head": Forms(joint_output=False, compensate="none"),
    "leverage": Forms(channels="ridge_leverage", compensate="none"),
    "no constant": Forms(constant=False, compensate="none"),
    "papers": PAPERS,
}


@pytest.fixture(scope="module")
def statistics(pipeline, calibration):
    return Compressor(pipeline, PROMPTS, calibration).statistics


def slimmed(pipeline, calibration, statistics, forms, **planning):
    """The dense and the slim denoiser with its maps, an eighth of all parameters gone."""
    work = Compressor(
        pipeline, PROMPTS, calibration, PlanSettings(allocation="uniform", align=4, forms=forms, **planning)
    )
    work.statistics = statistics
    maps = {}
    return work.denoiser, work.slim(work.plan(Budget("12%")), maps=maps), maps


def errors(dense, slim, maps, constant):
    """By path of every layer that changed, the relative error of the weight that the maps make of the dense one."""
    found, own = {}, dict(slim.named_parameters())
    for path, layer in dense.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            after = own[f"{path}.weight"]
            if layer.weight.shape != after.shape or not torch.equal(layer.weight, after):
                made = maps[path].weight(layer.weight, has_bias=constant and layer.bias is not None)
                found[path] = float((made - after).norm() / after.norm())
    return found


@pytest.mark.parametrize("name", FORMS)
def test_every_slim_weight_is_what_the_maps_make_of_the_dense_one(name, pipeline, calibration, statistics):
    forms = FORMS[name]
    found = errors(*slimmed(pipeline, calibration, statistics, forms), forms.constant)
    assert max(found.values()) < 1e-5
    for end in ("attn1.to_q", "attn2.to_k", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
        assert any(path.endswith(end) for path in found)
    assert any(path.endswith("proj_out") for path in found) == (forms.compensate != "none")


def test_what_mends_the_stream_is_a_weight_s_own(pipeline, calibration, statistics):
    local, mended = (
        slimmed(pipeline, calibration, statistics, Forms(compensate=how))[2] for how in ("none", "everything")
    )
    assert local.keys() == mended.keys()
    assert all(layer.into is None or layer.into.change is None for layer in mended.values())


@pytest.mark.parametrize("solve", ("channels", "none", "im2col"))
def test_those_of_resnets_mix_channels_and_the_rest_of_the_fit_is_the_weight_s_own(solve, calibration):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    settings = {"groups": ("resnet",), "resnets": ResnetSettings(solve=solve)}
    statistics = Compressor(pipeline, PROMPTS, calibration).statistics
    found = errors(*slimmed(pipeline, calibration, statistics, Forms(compensate="none"), **settings), True)
    last = {path: found.pop(path) for path in list(found) if path.endswith("conv2")}
    assert max(found.values()) == 0 and {path.rpartition(".")[2] for path in found} == {"conv1", "time_emb_proj"}
    assert max(last.values()) < (1e-5 if solve != "im2col" else 0.5) and len(last) > 2
    assert solve != "im2col" or min(last.values()) > 0


def test_what_is_kept_beside_a_slim_model_says_the_same(pipeline, calibration, statistics, tmp_path):
    dense, slim, maps = slimmed(pipeline, calibration, statistics, Forms())
    file = save_maps(tmp_path, maps, slim)
    assert file == tmp_path / MAPS
    again = load_maps(tmp_path, slim)
    assert again.keys() == maps.keys()
    stored = errors(dense, slim, again, True)
    assert 1e-6 < max(stored.values()) < 1e-3  # mixtures are in half precision
    kept = sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())
    assert file.stat().st_size < kept + 60_000
    with pytest.raises(InputError, match="is not this model's"):
        load_maps(tmp_path, dense)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        load_maps(tmp_path, slim)
    with pytest.raises(InputError, match="compress the dense model again"):
        load_maps(tmp_path / "gone", slim)


def test_to_ask_for_maps_changes_no_weight(pipeline, calibration, statistics):
    work = Compressor(pipeline, PROMPTS, calibration, PlanSettings(allocation="uniform", align=4))
    work.statistics = statistics
    plan, maps = work.plan(Budget("5%")), {}
    assert weights_hash(work.slim(plan)) == weights_hash(work.slim(plan, maps=maps)) and maps


def test_singular_moments_have_maps_too():
    """A head that nothing attends to gives zeros: the kept dimensions do not give themselves back."""
    group, heads, d = GROUPS["value_output"], 2, 4
    module = SimpleNamespace(to_v=nn.Linear(5, heads * d), to_out=[nn.Linear(heads * d, 6)])
    site = Site("attn", "value_output", heads, d, 1)
    noise = torch.randn(100, heads * d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[:, 1:4] = 0.0  # the first head moves in one direction alone
    statistics = SimpleNamespace(mean=lambda _: noise.T @ noise / 100, first=lambda _: noise.mean(0))
    evidence = Evidence(module, site, statistics, Forms())
    factor = group.factor(evidence)
    made = group.maps(evidence, 3, factor)["to_out.0"].weight(module.to_out[0].weight, has_bias=True)
    assert (made - group.slim(evidence, 3, factor)["to_out.0.weight"]).abs().max() < 1e-8
