"""Diffusion transformers as graphs: the same output, the plan's dims, open dims, and what a graph refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from every_pipeline.members import make_member
from families import FAMILIES
from families.family import noise

for module in ("onnxscript", "onnxruntime", "polygraphy"):
    pytest.importorskip(module, reason=f"{module} is an extra")

from exporters.graphs.export import export_unet  # noqa: E402
from exporters.graphs.inputs import latent_size  # noqa: E402
from exporters.graphs.naming import check_reduced_dims, with_layers  # noqa: E402
from exporters.graphs.pipeline import example_call  # noqa: E402
from exporters.graphs.shapes import leftover_dims  # noqa: E402
from exporters.layout import check_carried, read_config  # noqa: E402
from exporters.runtimes.denoiser import open_denoiser  # noqa: E402
from exporters.settings import ExportSettings  # noqa: E402
from exporters.validation.graph import check_parity  # noqa: E402
from slimdiff import Budget, InputError, Plan, PlanSettings, make_plan, slim_denoiser  # noqa: E402
from slimdiff.calibration.calibrate import calibrate_on_calls  # noqa: E402
from slimdiff.denoising.trajectory import Call, predict  # noqa: E402


@cache
def halved(name: str):
    """A family's member with three quarters of the ranks at every site, and two calls."""
    torch.manual_seed(0)
    dense, calls = FAMILIES[name].make(), FAMILIES[name].calls()
    statistics = calibrate_on_calls(dense, calls)
    plan = make_plan(dense, statistics, Budget("1%"), PlanSettings(allocation="uniform", align=4))
    for site in plan.sites.values():
        site.rank = max(1, site.dense_rank * 3 // 4)
    return slim_denoiser(dense, statistics, plan.recount(), fitting_calls=calls), calls


@pytest.fixture(scope="module", params=["flux", "sd3"])
def exported(request, tmp_path_factory) -> tuple[Path, torch.nn.Module, list[Call]]:
    slim, calls = halved(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    export_unet(slim, folder, calls[0])
    return folder, slim, calls


def test_a_slim_transformers_graph_computes_what_it_does_and_has_the_plans_dims(exported):
    folder, slim, calls = exported
    found = check_parity(slim, folder, calls)
    assert found["passed"] and found["precision"] == "fp32"
    plan = Plan.parse(read_config(folder)["slim_plan"], "slim_plan")
    rows = check_reduced_dims(folder / "model.onnx", plan)
    assert all(row["ok"] for row in rows) and {row["site"] for row in rows} == set(plan.sites)
    for site in plan.sites.values():
        site.rank += 1
    assert not any(row["ok"] for row in check_reduced_dims(folder / "model.onnx", plan))
    assert len(leftover_dims(folder / "model.onnx", plan)) >= len(plan.sites)
    assert with_layers(plan, slim) == plan


def test_a_transformers_graph_refuses_what_it_was_not_exported_for(exported):
    folder, _, calls = exported
    denoiser, arguments = open_denoiser(folder), calls[0].to("cpu")
    with pytest.raises(InputError, match="has no input for encoder_attention_mask"):
        denoiser(**arguments, encoder_attention_mask=torch.ones(2, 5))
    text = {"encoder_hidden_states": noise(2, 6, 24)}
    with pytest.raises(InputError, match="6 tokens, and .* takes 5"):
        denoiser(**arguments | text)
    with pytest.raises(InputError, match="pooled_projections"):
        denoiser(**{name: value for name, value in arguments.items() if name != "pooled_projections"})
    with pytest.raises(InputError, match="takes a timestep"):
        denoiser(**arguments | {"timestep": None})
    assert denoiser.batch == 2 and denoiser.latents == (8, 8)


@pytest.mark.parametrize(("precision", "split"), [("int8", False), ("fp32", True)])
def test_what_is_for_unets_alone_is_refused(precision, split, tmp_path):
    slim, calls = halved("flux")
    with pytest.raises(InputError, match="is for UNets, and the model has a SlimFluxTransformer2DModel"):
        export_unet(slim, tmp_path, calls[0], ExportSettings(precision=precision, split=split), calibration=calls)


def test_a_graph_is_open_in_the_batch_where_one_input_is_viewed_by_anothers(tmp_path):
    pipeline = make_member("PixArtAlphaPipeline")
    arguments = {"max_sequence_length": 8, "use_resolution_binning": False}
    one, three = (example_call(pipeline, height=16, width=16, batch=b, arguments=arguments) for b in (1, 3))
    export_unet(pipeline.transformer, tmp_path, one, ExportSettings(dynamic_batch=True))
    graph = open_denoiser(tmp_path)
    assert {takes[0] for takes in graph.inputs.values()} == {"batch"}
    for call in (one, three):
        torch.testing.assert_close(graph.predict(call), predict(pipeline.transformer, call), atol=1e-5, rtol=1e-4)


def test_noise_is_made_in_single_precision_for_a_graph_in_half(tmp_path):
    """A pipeline makes it in the denoiser's dtype, and hands it to a VAE that may be in another."""
    slim, calls = halved("sd3")
    export_unet(slim, tmp_path, calls[0], ExportSettings(precision="fp16"))
    graph = open_denoiser(tmp_path)
    assert graph.dtype == torch.float32 and graph.session.dtypes["hidden_states"] == "float16"


def test_what_is_no_tensor_in_a_call_is_refused(tmp_path):
    slim, calls = halved("flux")
    call = Call(0, 0, {**calls[0].arguments, "joint_attention_kwargs": {"scale": 0.5}})
    with pytest.raises(InputError, match=r"this call has joint_attention_kwargs\['scale'\]"):
        export_unet(slim, tmp_path, call)


def test_positions_of_one_size_cannot_be_left_open(tmp_path):
    """The graph would be written, and fail on the first image of another size."""
    slim, calls = halved("sd3")
    with pytest.raises(InputError, match="--dynamic size: the graph of a SlimSD3Transformer2DModel is for one size"):
        export_unet(slim, tmp_path, calls[0], ExportSettings(dynamic_size=True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    {
        "WanTransformer3DModel": "videos are made in torch alone",
        "SlimFlux2Transformer2DModel": "the norm inside its VAE",
        "SlimLumina2Transformer2DModel": "cuts each prompt to its own length",
        "QwenImageTransformer2DModel": "as many tokens as a prompt has",
        "CogView4Transformer2DModel": "as many tokens as a prompt has",
        "ZImageTransformer2DModel": "lists of images and of prompts",
        "OmniGenTransformer2DModel": "taken is AuraFlowTransformer2DModel or ",
    }.items(),
)
def test_another_transformer_is_refused_with_the_reason(kind, reason):
    index = {"_class_name": "APipeline", "text_encoder": ("transformers", "Qwen3Model"), "transformer": ("x", kind)}
    with pytest.raises(InputError, match=f"{kind}, which exported pipelines cannot have .*{reason}.*: stay in torch"):
        check_carried(index, "APipeline")


def test_tokens_without_places_have_no_height():
    with pytest.raises(InputError, match=r"hidden_states \[2, 16, 4\] does not say its height and width"):
        latent_size({"hidden_states": noise(2, 16, 4)})


@pytest.mark.slow
def test_open_batch_and_number_of_tokens(tmp_path):
    slim, calls = halved("flux")
    export_unet(slim, tmp_path, calls[0], ExportSettings(dynamic_batch=True, dynamic_size=True))
    denoiser = open_denoiser(tmp_path)
    assert denoiser.latents == (None, None) and isinstance(denoiser.batch, str)
    for batch, side in ((2, 8), (3, 6)):
        arguments = {key: value[:1].expand(batch, *value.shape[1:]) for key, value in calls[0].arguments.items()}
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(side / 2), torch.arange(side / 2))
        arguments |= {"img_ids": places, "txt_ids": calls[0].arguments["txt_ids"]}
        call = Call(0, 1, arguments | {"hidden_states": noise(batch, len(places), 4)})
        torch.testing.assert_close(denoiser.predict(call), predict(slim, call), atol=1e-4, rtol=1e-4)
