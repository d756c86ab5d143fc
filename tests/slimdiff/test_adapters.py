"""LoRA adapters: fused before slimming and recorded, or refused with what to do."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from diffusers import StableDiffusionPipeline
from torch import nn

from slimdiff import Budget, InputError, PlanSettings, calibrate, compress
from slimdiff.calibration.calibrate import calibrate_on_calls
from slimdiff.denoising.trajectory import Call
from slimdiff.models import refusing_misfits, slim_class_of

UNIFORM = PlanSettings(allocation="uniform", align=4)
ADAPTED = "mid_block.attentions.0.transformer_blocks.0.attn1"


class LoraLinear(nn.Module):
    """What PEFT leaves in a linear layer's place, as far as anyone can see without PEFT."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters = ["sketch"]
        self.lora_A = nn.Linear(base_layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_attached_adapter_is_refused_with_what_to_do(fresh_pipeline, calibration):
    attention = fresh_pipeline.unet.get_submodule(ADAPTED)
    attention.to_q = LoraLinear(attention.to_q)
    call = Call(0, 1, {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor(1)})
    for attempt in (
        lambda: compress(fresh_pipeline, PROMPTS, Budget("5%"), calibration=calibration),
        lambda: calibrate(fresh_pipeline, PROMPTS, calibration),
        lambda: calibrate_on_calls(fresh_pipeline.unet, [call]),
        lambda: slim_class_of(fresh_pipeline.unet),
    ):
        with pytest.raises(InputError, match=rf"adapter sketch is attached to 1 layers.*{ADAPTED}\.to_q.*fuse_lora"):
            attempt()


def test_a_layer_of_another_kind_stays_dense_with_its_reason(fresh_pipeline, calibration):
    class Scaled(nn.Linear):
        pass

    attention = fresh_pipeline.unet.get_submodule(ADAPTED)
    attention.to_q.__class__ = Scaled
    made = compress(fresh_pipeline, PROMPTS, Budget("5%"), calibration=calibration, planning=UNIFORM)
    reason = "values alone are slimmed: a projection is not a plain linear layer"
    assert made.plan.left_dense == [{"site": ADAPTED, "reason": reason}]
    assert f"{ADAPTED}.query_key" not in made.plan.sites and f"{ADAPTED}.values" in made.plan.sites


def test_a_real_adapter_is_refused_until_fused_and_then_recorded(calibration, tmp_path):
    peft = pytest.importorskip("peft", reason="diffusers loads adapters by peft")
    source = tiny_pipeline()
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0", "ff.net.0.proj"])
    source.unet.add_adapter(config, "style")
    layers = peft.utils.get_peft_model_state_dict(source.unet, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    arguments = {"calibration": calibration, "planning": UNIFORM}
    with pytest.raises(InputError, match="adapter style is attached"):
        compress(pipeline, PROMPTS, Budget("5%"), **arguments)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    made = compress(pipeline, PROMPTS, Budget("5%"), **arguments)
    assert made.plan.calibration["fused_adapters"] == ["style"]
    with pytest.raises(InputError, match="fuse it into the dense model"):
        made.pipeline.load_lora_weights(tmp_path, adapter_name="again")


def test_an_adapter_that_does_not_fit_a_slim_model_is_refused(compression, monkeypatch):
    """The way peft puts it, which need not be here; any other failure is left as it is."""
    said = "Error(s) in loading state_dict: size mismatch for to_q.lora_B.weight: ..."

    def fail(*_args, **_kwargs):
        raise RuntimeError(said)

    # The slim class wraps diffusers' method, which would ask for peft first.
    slim = compression.pipeline.unet
    monkeypatch.setattr(type(slim), "load_lora_adapter", refusing_misfits(fail))
    with pytest.raises(InputError, match="does not fit SlimUNet2DConditionModel"):
        slim.load_lora_adapter({})
    said = "out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        slim.load_lora_adapter({})
