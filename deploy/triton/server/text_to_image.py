"""A prompt becomes an image: diffusers' own pipeline, its models called through a function.

A Triton server runs this inside the BLS model beside it (`model.py`), where the function asks the server for its other
models. diffusers, transformers and numpy are all that it needs, and nothing that it reads can run code.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

Infer = Callable[[str, dict[str, np.ndarray], list[str]], dict[str, np.ndarray]]
"""Model's name, its inputs, names of outputs -> those outputs."""

COMPONENTS = "components.json"
"""By model: `batch` (of its graph; null where it is open), `inputs` and `outputs`, both name -> `dtype`, `shape`."""
USAGE = "usage.json"
"""`steps` and `guidance` of requests that do not say, as far as they are known."""
SCHEDULE = "schedule.json"
"""By number of the UNet's calls for an image: `guided` and `whole`, a digit a call. Not there: all are both."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = {
    "scheduler": "diffusers",
    **dict.fromkeys(("tokenizer", "tokenizer_2", "feature_extractor"), "transformers"),
}
"""Components that are not models, and the library that has their class: no other code is imported."""
_ENCODERS = ("text_encoder", "text_encoder_2")
STEP = "unet_step"
"""Of a UNet in parts, the model that takes what the others give: those run once for a prompt, and for a time."""
_HELD = {"unet_prompt": 2, "unet_time": 128}
"""And these others, with how many of their answers are kept."""


SHALLOW = "unet_shallow"
"""What runs in the place of the UNet, or of its step, in calls that are not whole, on what the last whole one kept."""
KEPT = "kept"


class Cancelled(Exception):
    """The caller wants no image any more."""


class TextToImage:
    """Makes images of the one size that the models are for.

    Args:
        folder: `model_index.json`, `components.json`, `usage.json`, perhaps `schedule.json`, the scheduler's and
            tokenizers' folders, and a `config.json` per model.
        infer: calls a model. It is given the model's own shapes and dtypes, with one more axis of 1 where a tensor has
            nothing but a batch (Triton has no scalars).
        max_steps: more than these are refused.

    Raises:
        ValueError: for a pipeline of another kind, or components of other libraries.
    """

    def __init__(self, folder: Path | str, infer: Infer, max_steps: int = 100):
        folder = Path(folder)
        index = _read(folder / "model_index.json")
        graphs = _read(folder / COMPONENTS)
        name = index["_class_name"]
        if name not in PIPELINES:
            raise ValueError(f"{name} is no pipeline that is served: {' and '.join(PIPELINES)} are")
        kind = getattr(diffusers, name)
        makers: dict[str, Callable[..., Any]] = {"unet": _UNet, "vae": _VAE, "safety_checker": _SafetyChecker}
        makers |= dict.fromkeys(_ENCODERS, _TextEncoder)
        parts: dict[str, Any] = {}
        for part in inspect.signature(kind).parameters:
            value = index.get(part)
            if part == "unet" and STEP in graphs:
                parts[part] = _UNetInParts(graphs, _read(folder / STEP / "config.json"), infer)
            elif part in makers and value is not None:
                model = "vae_decoder" if part == "vae" else part
                parts[part] = makers[part](model, graphs[model], _read(folder / model / "config.json"), infer)
            elif part in PARTS and value is not None:
                parts[part] = _from_library(folder / part, part, *value)
            elif part in index:
                parts[part] = value
            elif part in ("safety_checker", "feature_extractor", "image_encoder"):
                parts[part] = None
        self.max_steps, self.usage = max_steps, _read(folder / USAGE)
        self.pipeline = kind(**parts)
        self.pipeline.set_progress_bar_config(disable=True)
        if (folder / SCHEDULE).is_file():
            steps = _Steps(_read(folder / SCHEDULE)["calls"], self.pipeline)
            self.pipeline.unet.follow(steps, graphs.get(SHALLOW))
        height, width = graphs[STEP if STEP in graphs else "unet"]["inputs"]["sample"]["shape"][-2:]
        scale = self.pipeline.vae_scale_factor
        self.size = {"height": height * scale, "width": width * scale}

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Make one image.

        Args:
            prompt: what to show.
            negative_prompt: what not to show; without guidance it says nothing.
            seed: of the noise; with the same one, diffusers makes the same image of the same model on the CPU.
            steps: of the scheduler, 1 to `max_steps`; if not given, those that the model was calibrated with, else 20,
                or as many as are allowed.
            guidance: classifier-free guidance scale, 0 to 100; up to 1 there is none, and the UNet has half the work.
                If not given, that which the model was calibrated with, else 5.
            is_cancelled: asked after every step.

        Returns:
            uint8 `[height, width, 3]`.

        Raises:
            ValueError: for a value out of its range, saying which, and for a scheduler whose timesteps are not whole
                where the UNet takes whole ones.
            Cancelled: once `is_cancelled` says so.
            FloatingPointError: if a model overflows.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show")
        steps = min(self.usage.get("steps", 20), self.max_steps) if steps is None else steps
        guidance = self.usage.get("guidance", 5.0) if guidance is None else guidance
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"steps must be 1 to {self.max_steps}, not {steps}")
        if not 0 <= guidance <= 100:
            raise ValueError(f"guidance must be 0 to 100, not {guidance}")

        def after_step(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if is_cancelled():
                raise Cancelled("the request was cancelled")
            return tensors

        self.pipeline.unet.begin()
        image = self.pipeline(
            prompt,
            negative_prompt=negative_prompt or None,  # to SDXL, nothing and an empty text are two things
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=after_step,
            **self.size,
        ).images[0]
        if not np.isfinite(image).all():
            raise FloatingPointError("the image is not finite: a model overflows; `slimdiff validate` names where")
        return (image * 255).round().astype(np.uint8)


class _Remote(nn.Module):
    """A model that answers through `infer`, in the place of a pipeline's own."""

    dtype_of: str
    """Tensor whose dtype is the model's."""

    def __init__(self, name: str, graph: dict[str, Any], config: dict[str, Any], infer: Infer):
        super().__init__()
        self.name, self.graph, self.config, self.infer = name, graph, FrozenDict(config), infer
        self.dtype = getattr(torch, (graph["inputs"] | graph["outputs"])[self.dtype_of]["dtype"])
        self.device = torch.device("cpu")

    def ask(self, outputs: list[str], **given: Tensor) -> list[Tensor]:
        """Outputs for inputs `[B, ...]` of any B: in parts of the graph's own batch, where that is fixed."""
        return _ask(self.infer, self.name, self.graph, outputs, given)


def _ask(infer: Infer, name: str, graph: dict[str, Any], outputs: list[str], given: dict[str, Tensor]) -> list[Tensor]:
    """See `_Remote.ask`."""
    arrays = {
        key: np.ascontiguousarray(tensor.detach().cpu().numpy().astype(graph["inputs"][key]["dtype"], copy=False))
        for key, tensor in given.items()
    }
    arrays = {key: array[:, None] if array.ndim == 1 else array for key, array in arrays.items()}
    count = len(next(iter(arrays.values())))
    size = graph["batch"] or count
    answers = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)  # the last part is filled up
        answers.append(infer(name, {key: array[rows] for key, array in arrays.items()}, outputs))
    return [torch.from_numpy(np.concatenate([a[key] for a in answers])[:count]) for key in outputs]


class _Encoded(NamedTuple):
    """What pipelines read of a text encoder's answer: item 0, and the hidden states from the last."""

    first: Tensor
    hidden_states: tuple[Tensor, ...] | None


class _TextEncoder(_Remote):
    """CLIP, with or without projection."""

    dtype_of = "last_hidden_state"

    def forward(self, input_ids: Tensor, attention_mask: None = None, output_hidden_states: bool = False) -> _Encoded:
        first = "text_embeds" if "text_embeds" in self.graph["outputs"] else "last_hidden_state"
        if not output_hidden_states:
            return _Encoded(self.ask([first], input_ids=input_ids)[0], None)
        # Of these, SDXL reads the one before the last alone.
        layer = f"hidden_states.{self.config['num_hidden_layers'] - 1}"
        names = list(dict.fromkeys([first, layer, "last_hidden_state"]))
        answers = dict(zip(names, self.ask(names, input_ids=input_ids), strict=True))
        return _Encoded(answers[first], (answers[layer], answers["last_hidden_state"]))


class _Steps:
    """Where an image is in its schedule: the pipelines that are served call the UNet once for each of their times."""

    def __init__(self, calls: dict[str, dict[str, str]], pipeline: Any):
        self.calls, self.pipeline = calls, pipeline
        self.number = 0

    def next(self) -> tuple[bool, bool, int]:
        """Whether the next call is guided and whole, and how many branches of guidance it comes with."""
        count = len(self.pipeline.scheduler.timesteps)
        if (kinds := self.calls.get(str(count))) is None:
            raise ValueError(f"the schedule says nothing of {count} calls: ask for fewer steps")
        guided, whole = (kinds[name][self.number] == "1" for name in ("guided", "whole"))
        self.number += 1
        return guided, whole, 2 if self.pipeline.do_classifier_free_guidance else 1


class _UNet(_Remote):
    dtype_of = "sample"

    def __init__(self, name: str, graph: dict[str, Any], config: dict[str, Any], infer: Infer):
        super().__init__(name, graph, config, infer)
        if features := config.get("projection_class_embeddings_input_dim"):
            # SDXL pipelines read the width of the added embedding off the layer itself.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=features))
        self.steps: _Steps | None = None
        self.shallow: dict[str, Any] | None = None
        self.kept: Tensor | None = None

    def follow(self, steps: _Steps, shallow: dict[str, Any] | None) -> None:
        """Make images by a schedule; `shallow` is the graph of its calls that are not whole, if there are some."""
        self.steps, self.shallow = steps, shallow

    def begin(self) -> None:
        """Begin an image: nothing of another, which may have been cancelled, is reused."""
        self.kept = None
        if self.steps is not None:
            self.steps.number = 0

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **_others: Any,
    ) -> tuple[Tensor]:
        timesteps = torch.full((len(sample),), timestep.item(), dtype=timestep.dtype)
        if self.whole_times and not float(timestep).is_integer():
            raise ValueError(
                f"the UNet takes whole timesteps, not {float(timestep):g}: export the model again with this scheduler "
                "in its pipeline, or serve one whose timesteps are whole"
            )
        given = {"sample": sample, "timestep": timesteps, "encoder_hidden_states": encoder_hidden_states}
        given |= added_cond_kwargs or {}
        noise = self.answer(given, ["out_sample"])[0] if self.steps is None else self._by_schedule(given, self.steps)
        return (noise.to(sample.dtype),)

    def _by_schedule(self, given: dict[str, Tensor], steps: _Steps) -> Tensor:
        guided, whole, branches = steps.next()
        alone = branches > 1 and not guided  # the branch of the prompt, which is the last
        count = len(given["sample"]) // (branches if alone else 1)
        given = {name: tensor[-count:] for name, tensor in given.items()}
        if whole or self.kept is None:
            noise, *kept = self.answer(given, ["out_sample", *([KEPT] if self.shallow else [])])
            self.kept = kept[0] if kept else None
        else:
            (noise,) = self.answer(given | {KEPT: self.kept[-count:]}, ["out_sample"], shallow=True)
        return torch.cat([noise] * branches) if alone else noise

    @property
    def whole_times(self) -> bool:
        return self.graph["inputs"]["timestep"]["dtype"].startswith("int")

    def answer(self, given: dict[str, Tensor], outputs: list[str], shallow: bool = False) -> list[Tensor]:
        """Outputs of the UNet, or of its shallow graph, which take what they have inputs for."""
        name, graph = (SHALLOW, self.shallow) if shallow and self.shallow else (self.name, self.graph)
        return _ask(self.infer, name, graph, outputs, {key: given[key] for key in graph["inputs"]})


class _UNetInParts(_UNet):
    """What the prompt and the time decide is kept by the values that it was computed from."""

    def __init__(self, graphs: dict[str, Any], config: dict[str, Any], infer: Infer):
        super().__init__(STEP, graphs[STEP], config, infer)
        self.others = {name: graphs[name] for name in _HELD if name in graphs}
        self.held: dict[str, OrderedDict[object, dict[str, Tensor]]] = {name: OrderedDict() for name in self.others}

    @property
    def whole_times(self) -> bool:
        return self.others["unet_time"]["inputs"]["timestep"]["dtype"].startswith("int")

    def answer(self, given: dict[str, Tensor], outputs: list[str], shallow: bool = False) -> list[Tensor]:
        values = dict(given)
        for name, graph in self.others.items():
            values |= self._held(name, graph, {key: given[key] for key in graph["inputs"]})
        return super().answer(values, outputs, shallow)

    def _held(self, name: str, graph: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
        held, outputs = self.held[name], list(graph["outputs"])
        arrays = {key: tensor.detach().cpu().numpy() for key, tensor in given.items()}
        values = tuple((key, array.shape, array.dtype.str, array.tobytes()) for key, array in arrays.items())
        if values not in held:
            while len(held) >= _HELD[name]:
                held.popitem(last=False)
            held[values] = dict(zip(outputs, _ask(self.infer, name, graph, outputs, given), strict=True))
        held.move_to_end(values)
        return held[values]


class _VAE(_Remote):
    dtype_of = "latent_sample"

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> tuple[Tensor]:
        return (self.ask(["sample"], latent_sample=z)[0],)


class _SafetyChecker(_Remote):
    dtype_of = "clip_input"

    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Blacken images `[B, ...]` that are not to be shown, in place; and say of each whether it was."""
        found: list[bool] = self.ask(["has_nsfw_concepts"], clip_input=clip_input)[0].flatten().tolist()
        for image in (image for image, unsafe in zip(images, found, strict=True) if unsafe):
            image[...] = 0
        return images, found


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _from_library(folder: Path, part: str, library: str, kind: str) -> Any:
    if library != PARTS[part]:
        raise ValueError(f"the {part} is of {library}; taken is one of {PARTS[part]}")
    return getattr(importlib.import_module(library), kind).from_pretrained(folder)
