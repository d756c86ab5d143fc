"""A UNet alone is called as its pipeline would call it."""

from __future__ import annotations

import pytest
from conftest import tiny_unet
from families.images import IMAGES
from families.transformers import dit

from exporters.graphs.alone import call_of_unet
from exporters.graphs.inputs import named_inputs
from exporters.graphs.pipeline import example_call
from slimdiff import InputError
from slimdiff.planning.costs import count_macs


@pytest.mark.parametrize("name", ["sd1", "sdxl", "inpainting", "instruct-pix2pix", "unconditional"])
def test_inputs_and_their_shapes_are_those_of_the_pipelines_call(name):
    pipeline = IMAGES[name].make()
    own, whole = (
        {key: list(value.shape) for key, value in named_inputs(call.arguments)[0].items()}
        for call in (call_of_unet(pipeline.unet, batch=2), example_call(pipeline, batch=2))
    )
    if "encoder_hidden_states" in own:
        assert own["encoder_hidden_states"].pop(1) == 77 and whole["encoder_hidden_states"].pop(1) == 40
    assert own == whole
    assert count_macs(pipeline.unet, call_of_unet(pipeline.unet)) > 0


def test_guidance_as_an_input_takes_one_sample_and_classes_a_number_each():
    distilled = call_of_unet(tiny_unet(time_cond_proj_dim=16)).arguments
    assert len(distilled["sample"]) == 1 and distilled["timestep_cond"].shape == (1, 16)
    assert call_of_unet(tiny_unet(num_class_embeds=10), guidance=0).arguments["class_labels"].shape == (1,)


def test_what_a_configuration_does_not_say_is_refused():
    for unet in (tiny_unet(class_embed_type="timestep"), dit().transformer):
        with pytest.raises(InputError, match="does not say what it is called with: name its pipeline"):
            call_of_unet(unet)
