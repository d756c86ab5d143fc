"""A denoiser whose weights stay in their files gives what the same denoiser in memory gives, and never holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from families import FAMILIES
from safetensors.torch import load_file
from torch import nn

from slimdiff import Budget, Forms, InputError, PlanSettings
from slimdiff.calibration.calibrate import calibrate_on_calls, weights_hash
from slimdiff.denoising.offloading import device_of
from slimdiff.denoising.precision import cast
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_denoiser
from slimdiff.planning.costs import count_bytes, count_macs, count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.settings import StatisticsSettings
from slimdiff.slimming.offloaded import slim_offloaded
from slimdiff.slimming.slim import slim_denoiser
from slimdiff.storage.tensors import write_tensors

LOCAL = PlanSettings(allocation="local", align=2, forms=Forms().local())


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """A family's tiny member in several shards, and what it is called with."""
    family = FAMILIES[name]
    assert family.calls is not None
    torch.manual_seed(0)
    family.make().to(dtype).save_pretrained(folder, max_shard_size="20KB")  # type: ignore[union-attr]
    assert len(list(folder.glob("*.safetensors"))) > 2
    return family.calls()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_float32(denoiser: nn.Module) -> nn.Module:
    return cast(denoiser, lambda _: torch.float32)


@contextmanager
def weights_present() -> Iterator[list[int]]:
    """How many bytes of offloaded weights were there together, each time that a layer got its own."""
    before = (AlignDevicesHook.pre_forward, AlignDevicesHook.post_forward)
    there: dict[int, int] = {}
    seen: list[int] = [0]

    def taking(hook, module, *args, **kwargs):
        done = before[0](hook, module, *args, **kwargs)
        if hook.offload:
            there[id(hook)] = sum(p.nbytes for p in module.parameters(recurse=False) if not p.is_meta)
            seen.append(sum(there.values()))
        return done

    def leaving(hook, module, output):
        there.pop(id(hook), None)
        return before[1](hook, module, output)

    AlignDevicesHook.pre_forward, AlignDevicesHook.post_forward = taking, leaving
    try:
        yield seen
    finally:
        AlignDevicesHook.pre_forward, AlignDevicesHook.post_forward = before


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "lumina2", "sana"])
def test_a_slim_model_from_files_is_the_one_from_memory_to_the_bit(name, tmp_path):
    calls = saved(name, tmp_path / "dense")
    several = StatisticsSettings(memory_limit=16e3 / 2**30)
    plans, folders = [], []
    for offload in (False, True):
        held = load_denoiser(tmp_path / "dense", offload=offload)
        work = in_float32(held)
        statistics = calibrate_on_calls(work, calls * 20, several)
        statistics.sensitivities = {}
        planner = Planner(work, statistics, LOCAL, calls=calls)
        plan = planner.plan(Budget("9%"))
        folder = tmp_path / f"slim-{offload}"
        if offload:
            slim_offloaded(work, statistics, plan).save_pretrained(folder, max_shard_size="15KB")
        else:
            slim = cast(slim_denoiser(work, statistics, plan), lambda _: torch.bfloat16)
            slim.save_pretrained(folder, max_shard_size="15KB")
        plans.append(plan.model_dump())
        folders.append(folder)
    assert plans[0] == plans[1] and any(s["rank"] < s["dense_rank"] for s in plans[0]["sites"].values())
    memory, files = map(read_weights, folders)
    assert memory.keys() == files.keys()
    assert not [n for n in memory if memory[n].dtype != files[n].dtype or not torch.equal(memory[n], files[n])]
    index = "diffusion_pytorch_model.safetensors.index.json"
    for file in ("config.json", index):
        one, other = (json.loads((folder / file).read_text()) for folder in folders)
        assert one == other


def test_few_weights_are_in_memory_at_a_time(tmp_path):
    calls = saved("flux", tmp_path / "dense")
    held = load_denoiser(tmp_path / "dense", offload=True)
    assert all(p.is_meta for p in held.parameters()) and device_of(held).type in ("cpu", "cuda")
    work = in_float32(held)
    whole = count_bytes(work)
    largest = max(sum(p.nbytes for p in block.parameters()) for block in work.single_transformer_blocks)
    with weights_present() as seen:
        statistics = calibrate_on_calls(work, calls, StatisticsSettings())
        running = max(seen)
        plan = Planner(work, statistics, LOCAL).plan(Budget("15%"))
        slim = slim_offloaded(work, statistics, plan)
        slim.save_pretrained(tmp_path / "slim")
    assert 0 < running < largest < whole / 3  # a layer at a time
    assert max(seen) <= largest  # and a site at a time
    assert all(p.is_meta for model in (held, work, slim) for p in model.parameters())


def test_it_says_what_the_model_in_memory_says(tmp_path):
    calls = saved("flux", tmp_path / "dense")
    here, there = (load_denoiser(tmp_path / "dense", offload=offload) for offload in (False, True))
    assert weights_hash(there) == weights_hash(here) == weights_hash(in_float32(there))
    assert find_sites(there) == find_sites(here)
    assert count_parameters(there) == count_parameters(here) and count_bytes(there) == count_bytes(here)
    assert count_macs(there, calls[0]) == count_macs(here, calls[0])
    assert torch.equal(predict(in_float32(there), calls[0]), predict(in_float32(here), calls[0]))


def test_what_needs_the_slim_model_in_memory_is_refused_in_one_line(tmp_path):
    calls = saved("flux", tmp_path / "dense")
    work = in_float32(load_denoiser(tmp_path / "dense", offload=True))
    statistics = calibrate_on_calls(work, calls, StatisticsSettings())
    for changed, line in (
        ({"allocation": "global"}, "take the local allocation"),
        ({"forms": Forms()}, "compensate none"),
        ({"precision": "int8"}, "what int8 costs is measured"),
    ):
        with pytest.raises(InputError, match=line):
            Planner(work, statistics, PlanSettings(**{**LOCAL.model_dump(), **changed}), calls=calls)
    plan = Planner(work, statistics, LOCAL).plan(Budget("15%"))
    with pytest.raises(InputError, match="nothing is fitted on calls"):
        slim_offloaded(work, statistics, plan.model_copy(update={"forms": Forms()}))
    with pytest.raises(InputError, match="no weights until it is saved"):
        predict(slim_offloaded(work, statistics, plan), calls[0])


def test_files_that_do_not_make_up_the_model_are_refused(tmp_path):
    saved("flux", tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(InputError, match="its files lack"):
        load_denoiser(tmp_path / "dense", offload=True)


def test_a_file_written_tensor_by_tensor_reads_back(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "wide": torch.randn(7, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "counts": torch.arange(3),
    }
    write_tensors(tmp_path / "file.safetensors", {n: t.to("meta") for n, t in tensors.items()}, tensors.__getitem__)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())
