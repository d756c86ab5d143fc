"""Every kind of input that a denoiser has, by name: exported, fed, and open where graphs are open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

from exporters.engine.shapes import engine_shapes  # noqa: E402
from exporters.graphs.export import export_unet, unet_inputs  # noqa: E402
from exporters.graphs.inputs import NAMES, arguments_from, named_inputs  # noqa: E402
from exporters.graphs.reading import inputs_of, read_graph  # noqa: E402
from exporters.latency.worker import noise  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.settings import EngineSettings, ExportSettings, ShapeRange  # noqa: E402
from exporters.validation.graph import check_parity  # noqa: E402
from slimdiff.denoising.trajectory import Call, predict  # noqa: E402
from slimdiff.errors import InputError  # noqa: E402

OPEN = ExportSettings(dynamic_batch=True, dynamic_size=True)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def controlled(batch: int, height: int, width: int, **halves: int) -> dict[str, Any]:
    """What a ControlNet gives a UNet of `make` beside its inputs."""
    high, wide = -(-height // 2), -(-width // 2)
    down = [normal(batch, 8, height, width)] * 2 + [normal(batch, 8, high, wide), normal(batch, 16, high, wide)]
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": normal(batch, 16, high, wide)}


@dataclass(frozen=True)
class Kind:
    """A UNet's configuration, and the arguments beside the usual ones that a call of it has, by batch and size."""

    arguments: Callable[[int, int, int], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    unconditional: bool = False

    def unet(self) -> Any:
        torch.manual_seed(0)
        common = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        if self.unconditional:
            blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
            return UNet2DModel(**common, **blocks, attention_head_dim=4, **self.config).eval()
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        text = {"cross_attention_dim": 8, "attention_head_dim": 2}
        unet = UNet2DConditionModel(**common, down_block_types=down, up_block_types=up, **{**text, **self.config})
        return unet.eval()

    def call(self, batch: int = 1, height: int = 8, width: int = 8) -> Call:
        channels = 3 if self.unconditional else 4
        arguments = {"sample": normal(batch, channels, height, width), "timestep": torch.tensor(21)}
        if not self.unconditional:
            arguments["encoder_hidden_states"] = normal(batch, 5, 8)
        return Call(0, 21, {**arguments, **self.arguments(batch, height, width)})


KINDS = {
    "unconditional": Kind(lambda *_: {}, unconditional=True),
    "unconditional, classes": Kind(lambda b, *_: {"class_labels": torch.arange(b)}, {"num_class_embeds": 9}, True),
    "class indices": Kind(lambda b, *_: {"class_labels": torch.arange(b)}, {"num_class_embeds": 9}),
    "class numbers": Kind(lambda b, *_: {"class_labels": 20.3 + torch.arange(b)}, {"class_embed_type": "timestep"}),
    "class embeddings": Kind(
        lambda b, *_: {"class_labels": normal(b, 6)},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
    ),
    "guidance of LCM": Kind(lambda b, *_: {"timestep_cond": normal(b, 12)}, {"time_cond_proj_dim": 12}),
    "ControlNet": Kind(controlled),
    "many at once": Kind(
        lambda b, *size: {"class_labels": torch.arange(b), "timestep_cond": normal(b, 12), **controlled(b, *size)},
        {"num_class_embeds": 9, "time_cond_proj_dim": 12},
    ),
    "T2I-Adapter": Kind(lambda b, h, w: {"down_intrablock_additional_residuals": [
        normal(b, 8, -(-h // 2), -(-w // 2)), normal(b, 16, -(-h // 2), -(-w // 2))]}),
}  # fmt: skip
QUICK = ("unconditional, classes", "many at once")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[[str], UNet]:
    """The graph of a kind, open in batch and size."""

    @cache
    def graph(name: str) -> UNet:
        kind = KINDS[name]
        return UNet.open(export_unet(kind.unet(), tmp_path_factory.mktemp("open"), kind.call(), OPEN), threads=1)

    return graph


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    return float((candidate - reference).norm() / reference.norm())


def test_names_and_arguments_are_two_ways_to_say_the_same():
    arguments = {"sample": normal(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": None, "class_labels": None}
    arguments |= controlled(2, 8, 8) | {
        "added_cond_kwargs": {"image_embeds": [normal(2, 1, 3, 8)], "text_embeds": None}
    }
    inputs, unknown = named_inputs(arguments)
    assert not unknown and list(inputs)[-2:] == ["down_block_additional_residuals_3", "mid_block_additional_residual"]
    assert {"image_embeds_0", "down_block_additional_residuals_0"} < set(inputs)
    back = arguments_from(inputs)
    assert list(back["added_cond_kwargs"]) == ["image_embeds"] and len(back["down_block_additional_residuals"]) == 4
    assert named_inputs(back)[0].keys() == inputs.keys()


def test_eleven_residuals_stay_in_their_order():
    residuals = [torch.full((1, 1), float(i)) for i in range(11)]
    inputs, _ = named_inputs({"down_block_additional_residuals": residuals})
    assert [float(value) for value in inputs.values()] == [float(i) for i in range(11)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"encoder_attention_mask": torch.ones(1, 5)}, "encoder_attention_mask"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, r"cross_attention_kwargs\['scale'\]"),
        (
            {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1)]}},
            r"cross_attention_kwargs\['ip_adapter_masks'\]\[0\]",
        ),
        ({"added_cond_kwargs": {"aesthetic": torch.ones(1)}}, r"added_cond_kwargs\['aesthetic'\]"),
    ],
)
def test_an_argument_of_no_input_is_one_line(arguments, named):
    call = KINDS["ControlNet"].call()
    with pytest.raises(InputError, match=rf"takes {', '.join(NAMES.values())}; this call has {named}"):
        unet_inputs(Call(0, 21, call.arguments | arguments))


@pytest.mark.parametrize("name", EACH)
def test_an_open_graph_computes_what_torch_does_at_any_batch_and_size(name, opened):
    kind = KINDS[name]
    unet, graph = kind.unet(), opened(name)
    assert set(graph.inputs) == set(unet_inputs(kind.call()))
    calls = [kind.call(), kind.call(3, 12, 16), kind.call(1, 4, 8)]
    assert all(relative_error(graph.predict(call), predict(unet, call)) < 1e-5 for call in calls)
    assert check_parity(unet, graph, calls[:1], every_module=True)["passed"]
    session = graph.session.run(noise({n: (_sizes(s), graph.session.dtypes[n]) for n, s in graph.inputs.items()}, 1))
    assert session["out_sample"].shape[0] == 1
    sizes = {end: {"sample": (b, *calls[0].arguments["sample"].shape[1:2], 8, 16)} for end, b in zip(
        ("min", "opt", "max"), (1, 2, 4), strict=True)}  # fmt: skip
    profiles = engine_shapes(graph.inputs, EngineSettings(profiles=[ShapeRange(**sizes)]))
    (profile,) = profiles["profiles"]
    call = kind.call(4, 8, 16)
    assert {n: v["max"] for n, v in profile.items()} == {n: list(v.shape) for n, v in unet_inputs(call).items()}


def _sizes(shape: tuple[int | str, ...]) -> list[int | None]:
    """Those of a call on 4 x 4, the batch left open."""
    sides = {"height": 2, "width": 2, "2*height": 4, "2*width": 4}
    return [dim if isinstance(dim, int) else sides.get(dim) for dim in shape]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_fixed_graph_of_one_sample_computes_what_torch_does_in_fp32_and_fp16(name, tmp_path):
    kind = KINDS[name]
    unet = kind.unet()
    for precision, bound in (("fp32", 1e-5), ("fp16", 5e-3)):
        file = export_unet(unet, tmp_path / precision, kind.call(), ExportSettings(precision=precision))
        assert relative_error(UNet.open(file, threads=1).predict(kind.call()), predict(unet, kind.call())) < bound
        dtypes = {n: spec.dtype for n, spec in inputs_of(read_graph(file)).items()}
        expected = {"class indices": "int64", "class numbers": "float32"}
        if name in expected:
            assert dtypes["class_labels"] == expected[name]


def test_what_an_input_does_not_take_is_refused(opened):
    kind, graph = KINDS["unconditional, classes"], opened("unconditional, classes")
    for arguments, told in (
        ({"class_labels": torch.tensor([0.5, 1])}, r"takes whole numbers for class_labels, given were \[0.5, 1.0\]"),
        ({"class_labels": torch.tensor([1, 2, 3])}, r"class_labels has shape \(3,\)"),
        ({"class_labels": None}, "class_labels"),
        (controlled(2, 8, 8), "has no input for down_block_additional_residuals_0"),
    ):
        with pytest.raises(InputError, match=told):
            graph.predict(Call(0, 21, kind.call(2).arguments | arguments))


def test_sides_in_another_proportion_are_refused(opened):
    call = KINDS["many at once"].call()
    with pytest.raises(InputError, match=r"mid_block_additional_residual has shape \(1, 16, 3, 4\)"):
        opened("many at once").predict(
            Call(0, 21, call.arguments | {"mid_block_additional_residual": normal(1, 16, 3, 4)})
        )
