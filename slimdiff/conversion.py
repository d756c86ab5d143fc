"""A LoRA of a dense model converted onto a slim one, in closed form.

Slimming is linear in a weight (`slimdiff.groups.maps`), so an update of a dense layer has one of the same rank on the
slim layer. The maps were chosen for the weight W and not for W + update: that is the approximation, beside slimming's
own, and it vanishes with the update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from slimdiff.calibration.calibrate import weights_hash
from slimdiff.compression import Compression, Compressor
from slimdiff.denoising.modules import at_rest
from slimdiff.denoising.tasks import for_task, make_inputs
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Inputs, denoiser_name, predict, with_denoiser
from slimdiff.errors import InputError
from slimdiff.fidelity import noise_error
from slimdiff.groups.maps import LayerMap, Maps
from slimdiff.loading.lora_files import OWN_METADATA, read_lora
from slimdiff.loading.loras import attached
from slimdiff.loading.naming import find_model
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.models import plan_of
from slimdiff.prompts.material import Material
from slimdiff.settings import CalibrationSettings, Lora, PlanSettings
from slimdiff.slimming.map_file import load_maps
from slimdiff.storage import manifest


@dataclass
class ConvertedLora:
    """A LoRA for a slim model, in the layout that `load_lora_weights` reads; every scale is 1.

    Attributes:
        tensors: by name, in the dtype that the file had.
        converted: paths of the denoiser's layers whose updates were changed.
        unchanged: those of layers that slimming left alone, text encoders' among them.
        made_from: the file's name and SHA-256, and the hashes of both models' weights.
    """

    tensors: dict[str, Tensor]
    converted: list[str]
    unchanged: list[str]
    made_from: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it as safetensors; its header says what it was made from and for."""
        about = {**self.made_from, "versions": manifest.versions(("slimdiff", "torch", "diffusers"))}
        with manifest.replacing(Path(path).absolute(), is_file=True) as temporary:
            save_file(self.tensors, temporary, {"format": "pt", OWN_METADATA: json.dumps(about)})


@own_torch_state()
def convert_lora(lora: str | Path, onto: str | Path | Compression, *, variant: str | None = None) -> ConvertedLora:
    """Convert a LoRA of a dense model onto a slim one.

    Args:
        lora: a safetensors file in any layout that diffusers reads.
        onto: the slim model's folder, or what `compress` gave.
        variant: of the folder's weights.

    Raises:
        InputError: if the LoRA is not the dense model's, or the model is not slim or has no maps.
        MissingPackageError: if peft is not here.
    """
    file = read_lora(Path(lora))
    if file.own:
        raise InputError(f"{lora} was converted for a slim model already: convert the LoRA that it was made from")
    if file.is_dora:
        raise InputError(
            f"{lora} is a DoRA, whose lengths are those of dense weights: fuse it before slimming (compress --lora)"
        )
    pipeline, maps = _opened(onto, variant)
    slim = getattr(pipeline, denoiser_name(pipeline))
    plan = plan_of(slim)
    assert plan is not None
    kind = getattr(diffusers, type(slim).__name__.removeprefix("Slim"))
    dense = {key: value for key, value in slim.config.items() if key != "slim_plan"}
    dtype = file.updates[0].down.dtype
    tensors: dict[str, Tensor] = {}
    converted: list[str] = []
    unchanged: list[str] = []
    with attached(with_denoiser(pipeline, _weightless(kind, dense)), file) as layers:
        for component, found in layers.items():
            own = maps if component == denoiser_name(pipeline) else {}
            for path, layer in found.items():
                (converted if path in own else unchanged).append(f"{component}.{path}")
                up, down = own.get(path, LayerMap()).update(layer.scale * layer.up.detach().double(), layer.down)
                fits = getattr(pipeline, component).get_submodule(path).weight.shape[:2]
                if (len(up), down.shape[1]) != fits:  # of a group that keeps no maps
                    raise InputError(f"nobody knows how slimming changed {component}.{path}: {lora} updates it")
                name = _name(component, path)
                tensors |= {f"{name}.lora_A.weight": _narrow(down, dtype), f"{name}.lora_B.weight": _narrow(up, dtype)}
    source = {"file": file.path.name, "sha256": manifest.sha256_of(file.path)}
    made_from = {"lora": source, "dense": plan.model_hash, "slim": weights_hash(slim)}
    return ConvertedLora(tensors, converted, unchanged, made_from)


def _opened(onto: str | Path | Compression, variant: str | None) -> tuple[DiffusionPipeline, Maps]:
    if isinstance(onto, Compression):
        return onto.pipeline, onto.maps
    folder = find_model(onto)
    if folder is None:
        raise InputError(f"{onto} is on the hub: the maps of a slim model are in its folder, name that")
    pipeline = load_pipeline(folder, variant=variant)
    slim = getattr(pipeline, denoiser_name(pipeline))
    if plan_of(slim) is None:
        raise InputError(f"{onto} is a dense model, which takes the LoRA as it is (--lora): name a slim one")
    return pipeline, load_maps(folder, slim)


def _weightless(kind: Any, config: dict[str, Any]) -> nn.Module:
    """A model whose weights are zeros that take no memory: PEFT looks at shapes alone."""
    with torch.device("meta"):
        model = kind.from_config(config)
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model


def _name(component: str, path: str) -> str:
    """transformers 5 has no `text_model` in CLIP, and older ones need it: diffusers takes it out where it is not."""
    inside = "text_model." if component.startswith("text_encoder") and not path.startswith("text_model.") else ""
    return f"{component}.{inside}{path}"


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype, or in float32 if that does not hold it."""
    narrow = tensor.detach().to(dtype)
    return (narrow if torch.isfinite(narrow).all() else tensor.detach().float()).contiguous()


@own_torch_state()
def conversion_error(
    converted: str | Path,
    lora: str | Path,
    onto: str | Path,
    dense: str | Path,
    prompts: Sequence[Inputs] | Material,
    calibration: CalibrationSettings | None = None,
    *,
    variants: Mapping[Any, str | None] | None = None,
) -> dict[str, Any]:
    """How close a slim model with a converted LoRA is to the dense model with the LoRA, and what fusing first gives.

    The dense model with the LoRA is slimmed by the slim model's plan, with statistics of its own: all but the planning
    of a compression. Errors are relative mean squared changes of the noise prediction on trajectories of the dense
    model with the LoRA that no calibration has seen.

    Args:
        converted: the file that was converted; lora: what from; onto, dense: the models' folders or names.
        prompts: calibration prompts, and after `calibration.samples` of them those that are measured on, if any; or
            material of another task, pictures among it.
        variants: of the models' weights, by their names.

    Returns:
        `converted`: of the slim model with the converted LoRA; `slim_of_fused`: of the slim one of the dense model with
        the LoRA; `between`: of the first against the second; `lora`: what the LoRA itself changes of the dense model.

    Raises:
        InputError: if the slim model was not made of this dense one.
    """
    variant, calibration = variants or {}, calibration or CalibrationSettings()
    pipelines = {
        "lora": load_pipeline(dense, "fp32", variant=variant.get(dense)),
        "converted": load_pipeline(onto, "fp32", variant=variant.get(onto), lora=[Lora(file=str(converted))]),
    }
    parts = {name: getattr(pipeline, denoiser_name(pipeline)) for name, pipeline in pipelines.items()}
    plan = plan_of(parts["converted"])
    if plan is None or weights_hash(parts["lora"]) != plan.model_hash:
        raise InputError(f"{onto} was not made of {dense} (its weights differ): name the dense model that it was")
    fused = load_pipeline(dense, "fp32", variant=variant.get(dense), lora=[Lora(file=str(lora))])
    groups = tuple(dict.fromkeys(site.group for site in plan.sites.values()))
    settings = PlanSettings(forms=plan.forms, align=plan.align, groups=groups)
    if isinstance(prompts, Material):
        fused = for_task(fused, prompts)
        prompts, sampling = make_inputs(fused, prompts, calibration.sampling)
        calibration = calibration.model_copy(update={"sampling": sampling})
    work = Compressor(fused, prompts, calibration, settings)
    parts["slim_of_fused"] = work.slim(plan.model_copy(update={"model_hash": work.statistics.model_hash}))
    parts = {name: at_rest(part) for name, part in parts.items()}
    reference = at_rest(getattr(fused, denoiser_name(fused)))
    pairs = {name: (reference, part) for name, part in parts.items()}
    pairs["between"] = parts["slim_of_fused"], parts["converted"]
    return {
        name: noise_error(partial(predict, one), partial(predict, other), work.calls.held)["relative_mse"]
        for name, (one, other) in pairs.items()
    }
