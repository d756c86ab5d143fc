"""One component of a pipeline, loaded so that every weight of it comes from its files, in the dtype that they have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ModelMixin
from torch import nn

from slimdiff.denoising.precision import refuse_overflow
from slimdiff.errors import InputError
from slimdiff.loading.single_file import listed
from slimdiff.loading.weights import DTYPES, Weights, float_dtypes, read_headers

_SHAPES = re.compile(r"because (?P<name>\S+) expected shape (?P<model>.*?), but got (?P<file>.*?)\. ")


def load_component(
    folder: Path, kind: Any, weights: Weights, dtype: torch.dtype | None = None, variant: str | None = None
) -> nn.Module:
    """A model of diffusers or transformers, with every weight from its files.

    Args:
        kind: its class.
        weights: `find_weights` of the folder.
        dtype: of all its floating-point weights; each keeps that of its file if not given. What its class keeps in
            float32 on purpose is computed with in float32, and saved as its file has it.
        variant: see `Weights.choose`.

    Raises:
        InputError: naming the component and the tensors that are missing, unknown or of another shape, or that `dtype`
            is too narrow for.
    """
    chosen = weights.choose(variant)
    _, own, _, loaded_as = choose_dtypes(folder, kind, weights.files[chosen], dtype)
    model = _load(folder, kind, loaded_as, chosen)
    _keep_dtypes(model, {plain_name(name): d for name, d in own.items()})
    if dtype == torch.float16:
        refuse_overflow(model, folder.name)
    return model.eval()


def choose_dtypes(
    folder: Path, kind: Any, files: Sequence[Path], dtype: torch.dtype | None
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, torch.dtype], set[str], torch.dtype]:
    """What the files' headers say, and the dtypes that weights are loaded in.

    Returns:
        `read_headers`; the dtype of each floating-point tensor by its file, if no `dtype` is asked for; parts of names
        of what the class keeps in float32 on purpose; and the dtype that the model is loaded in.
    """
    headers = read_headers(files)
    own = float_dtypes(headers, folder) if dtype is None else {}
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ()) if issubclass(kind, ModelMixin) else set()
    there = {d for name, d in own.items() if kept.isdisjoint(name.split("."))} or {torch.float32}
    # The widest of them: nothing is rounded.
    return headers, own, kept, dtype or next(d for d in DTYPES.values() if d in there)


def _keep_dtypes(model: Any, own: Mapping[str, torch.dtype]) -> None:
    """Give each tensor the dtype that its file has, by `own`; what is kept in float32 on purpose is saved in it."""
    kept = {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    saved = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        dtype = own.get(plain_name(name), tensor.dtype)
        if kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
        elif dtype != tensor.dtype:
            saved[name] = dtype
    if saved:
        model.register_state_dict_post_hook(partial(_cast_saved, saved))


def _cast_saved(saved: Mapping[str, torch.dtype], model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Cast tensors of a model's state, as long as the model has others of that dtype: it may have been cast since."""
    there = {tensor.dtype for tensor in model.parameters()}
    state.update({prefix + name: state[prefix + name].to(dtype) for name, dtype in saved.items() if dtype in there})


def _load(folder: Path, kind: Any, dtype: torch.dtype, variant: str | None) -> Any:
    common = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True, "variant": variant}
    if issubclass(kind, ModelMixin):
        try:
            model, info = kind.from_pretrained(folder, torch_dtype=dtype, **common)
        except ValueError as error:
            if (found := _SHAPES.search(str(error))) is None:
                raise
            sides = (str(list(map(int, re.findall("[0-9]+", found[side])))) for side in ("file", "model"))
            what = f"{found['name']} is {' in the files and '.join(sides)} in the model"
            raise InputError(fault(folder, kind, what)) from error
    else:
        more = {"key_mapping": mapping} if (mapping := _key_mapping(kind)) else {}
        model, info = kind.from_pretrained(folder, dtype=dtype, ignore_mismatched_sizes=True, **common, **more)
    buffers = {plain_name(name) for name, _ in model.named_buffers()}  # older files hold those that are computed now
    unknown = [name for name in info["unexpected_keys"] if plain_name(name) not in buffers]
    other = [f"{name[0]} ({list(name[1])} in the files)" for name in info["mismatched_keys"]]
    for names, what in ((info["missing_keys"], "lack"), (other, "have another shape of"), (unknown, "also have")):
        if names:
            raise InputError(fault(folder, kind, f"its files {what} {listed(names)}"))
    return model


def fault(folder: Path, kind: Any, what: str) -> str:
    """Why a component's files do not make it up."""
    return f"the {folder.name} in {folder.parent} is no whole {kind.__name__}: {what}; copy or save it again"


def plain_name(name: str) -> str:
    """A weight's name without the parts that transformers 4 has in CLIP and transformers 5 has not."""
    return re.sub(r"\b(text_model|vision_model)\.", "", name)


def _key_mapping(kind: Any) -> dict[str, str]:
    """Names of CLIP's weights as transformers 5 writes them -> as 4 needs them; 5 reads both by itself."""
    if int(transformers.__version__.split(".")[0]) > 4:
        return {}
    if kind is transformers.CLIPTextModel:
        return {r"^(?!text_model\.)": "text_model."}
    if kind is transformers.CLIPVisionModel:
        return {r"^(?!vision_model\.)": "vision_model."}
    if kind.__name__ == "StableDiffusionSafetyChecker":
        return {r"^vision_model\.(?!vision_model\.)": "vision_model.vision_model."}
    return {}
