"""Optimum's layout of an exported pipeline: what lies where, by name, and the models' configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from slimdiff.errors import InputError
from slimdiff.schedule import FILE
from slimdiff.storage import manifest

INDEX = "model_index.json"
GRAPH = "model.onnx"
ENGINE = "model.engine"
SHALLOW = "shallow.onnx"
"""Beside a UNet's graph: the part of it that a schedule runs in some steps, on the same file of weights."""
SHALLOW_ENGINE = "shallow"
"""In the folder of a UNet's engine: that of its shallow graph's."""
CONFIG = "config.json"
PROMPT, TIME, STEP = PARTS = ("prompt", "time", "step")
"""Folders in that of a denoiser whose graph, or engine, is in parts: `exporters.graphs.split` says what is in them."""
DENOISERS = ("unet", "transformer")
"""Components that denoise; a pipeline has one of them."""
EXPORTED_FOR = "exported_for"
"""In a transformer's `config.json`: `latents`, the height and width that its graph is for (None: any)."""
IMAGE_ENCODER = "image_encoder"
"""A folder with a graph of what IP-Adapters are shown pictures by."""
SAFETY_CHECKER = "safety_checker"
STEERING = ("controlnet", "adapter")
"""Components that give the UNet residuals, beside its prompt. A second one lies in `controlnet_1`."""
FINAL_NORM = ("final_layer_norm.weight", "final_layer_norm.bias")
"""Outputs `[B, D]` of a text encoder's graph beside its hidden states, where its pipeline puts that norm on them."""
_OPTIMUM = "optimum.onnxruntime.modeling_diffusion"


@dataclass(frozen=True)
class Component:
    """A kind of component of diffusers' pipelines: what it is in an exported one.

    A new kind is a row of `COMPONENTS`, a function that exports it, and a class that opens it.
    """

    names: tuple[str, ...]
    """That pipelines have for it."""
    classes: tuple[str, ...] = ()
    """That are exported; any if empty."""
    refused: tuple[tuple[str, str], ...] = ()
    """Of others, a pattern of their names and why they are not."""
    graphs: tuple[str, ...] = ()
    """Folders with a graph each, or an engine of it, as endings of its name. None: a folder of settings alone."""
    exports: str = ""
    """`module:function` that writes one of its graphs: see `exporters.graphs.pipeline.export_pipeline`."""
    opens: str = ""
    """`module:class` of a `RuntimeModule`, which opens it."""
    parts: tuple[str, ...] = ()
    """Folders in its own that hold its graph, or engines of it, in parts, where it was exported so."""
    optimum: str = ""
    """optimum's class for it, which `model_index.json` then names in the place of its own."""
    exact: bool = False
    """Whether it stays a graph in float32 beside engines, too: rounding could turn its verdict."""

    def folders(self, name: str) -> tuple[str, ...]:
        """Where a component of that name lies."""
        return tuple(name + ending for ending in self.graphs) or (name,)

    def load(self, way: Literal["exports", "opens"]) -> Any:
        """The function or class of that field; imports what it lies in."""
        module, _, name = getattr(self, way).partition(":")
        return getattr(import_module(module), name)


_GRAPHS = "exporters.graphs.pipeline"
_RUNTIMES = "exporters.runtimes"
_NAMED: Any = {
    "graphs": ("",),
    "exports": f"{_GRAPHS}:export_transformer",
    "opens": f"{_RUNTIMES}.transformer:Transformer",
}
_PROMPTS = "it is called with as many tokens as a prompt has, and a graph has one number of them"
COMPONENTS = (
    Component(
        names=("unet",),
        graphs=("",),
        parts=PARTS,
        exports=f"{_GRAPHS}:export_denoiser",
        opens=f"{_RUNTIMES}.unet:UNet",
        optimum="ORTUnet",
    ),
    Component(
        names=("transformer",),
        classes=(
            "AuraFlowTransformer2DModel",
            "ChromaTransformer2DModel",
            "DiTTransformer2DModel",
            "FluxTransformer2DModel",
            "HunyuanDiT2DModel",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "SanaTransformer2DModel",
        ),
        refused=(
            ("*3DModel", "videos are made in torch alone"),
            ("Flux2Transformer2DModel", "its pipeline reads the norm inside its VAE, and a graph shows none"),
            ("Lumina2Transformer2DModel", "it cuts each prompt to its own length, and a graph has one"),
            ("QwenImage*Transformer2DModel", _PROMPTS),
            ("CogView4Transformer2DModel", _PROMPTS),
            ("ZImageTransformer2DModel", "it takes lists of images and of prompts, and a graph takes tensors"),
        ),
        graphs=("",),
        exports=f"{_GRAPHS}:export_denoiser",
        opens=f"{_RUNTIMES}.diffusion_transformer:DiffusionTransformer",
        optimum="ORTTransformer",
    ),
    Component(
        names=("text_encoder", "text_encoder_2", "text_encoder_3"),
        classes=(
            "CLIPTextModel",
            "CLIPTextModelWithProjection",
            "BertModel",
            "Gemma2Model",
            "MT5EncoderModel",
            "T5EncoderModel",
            "UMT5EncoderModel",
        ),
        graphs=("",),
        exports=f"{_GRAPHS}:export_text_encoder",
        opens=f"{_RUNTIMES}.text_encoder:TextEncoder",
        optimum="ORTTextEncoder",
    ),
    Component(names=("bert",), classes=("LDMBertModel",), **_NAMED),
    Component(names=("depth_estimator",), classes=("DPTForDepthEstimation",), **_NAMED),
    Component(
        names=(SAFETY_CHECKER,),
        classes=("StableDiffusionSafetyChecker",),
        graphs=("",),
        exports=f"{_GRAPHS}:export_safety_checker",
        opens=f"{_RUNTIMES}.safety_checker:SafetyChecker",
        exact=True,
    ),
    Component(
        names=("vae",),
        classes=("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"),
        graphs=("_decoder", "_encoder"),
        exports="exporters.graphs.vae:export_vae",
        opens=f"{_RUNTIMES}.vae:VAE",
        optimum="ORTVae",
    ),
    Component(
        names=("controlnet",),
        classes=("ControlNetModel", "MultiControlNetModel"),
        graphs=("",),
        exports="exporters.graphs.steering:export_controlnet",
        opens=f"{_RUNTIMES}.steering:ControlNet",
    ),
    Component(
        names=("adapter",),
        classes=("T2IAdapter",),
        graphs=("",),
        exports="exporters.graphs.steering:export_adapter",
        opens=f"{_RUNTIMES}.steering:Adapter",
    ),
    Component(
        names=(IMAGE_ENCODER,),
        classes=("CLIPVisionModelWithProjection",),
        graphs=("",),
        exports="exporters.graphs.steering:export_image_encoder",
        opens=f"{_RUNTIMES}.steering:ImageEncoder",
    ),
    Component(
        names=("vqvae",),  # whose pipelines encode nothing
        classes=("VQModel", "AutoencoderKL"),
        graphs=("_decoder",),
        exports="exporters.graphs.vae:export_vae",
        opens=f"{_RUNTIMES}.vae:VAE",
    ),
    Component(names=("scheduler", "low_res_scheduler", "inverse_scheduler", "image_noising_scheduler")),
    Component(names=("tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor")),
)
"""In the order in which they are exported."""
_ROWS = {name: row for row in COMPONENTS for name in row.names}
FOLDERS = tuple(folder for name, row in _ROWS.items() for folder in row.folders(name))
"""Every folder that an exported pipeline may have."""
CONFIGURED = tuple(name for name, row in _ROWS.items() if not row.graphs)
"""Folders with settings alone."""
EXACT = tuple(name for name, row in _ROWS.items() if row.exact)
AUTOENCODERS = tuple(name for name, row in _ROWS.items() if "_decoder" in row.graphs)
ENGINE_PIPELINE = "engine-pipeline"
"""The kind, in its manifest, of a folder with engines in the graphs' places."""


def check_carried(index: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a pipeline with a component that an exported one has no place for: none is dropped without a word.

    Args:
        index: what `model_index.json` has, or a pipeline's `config`: of components, their library and class.

    Raises:
        InputError: naming the first of them.
    """
    for name, entry in sorted(index.items(), key=lambda item: item[0] not in DENOISERS):
        if not is_component(entry):
            continue
        row = _ROWS.get(name)
        exported = entry[0].startswith("optimum") or entry[1] == "OnnxRuntimeModel"
        own = entry[1].removeprefix("Slim") if name in DENOISERS else entry[1]
        if row and (not row.classes or own in row.classes or (row.optimum and exported)):
            continue
        cannot = f"{where} asks for the {name} {'.'.join(entry)}, which exported pipelines cannot have"
        if row:
            reasons = [reason for pattern, reason in row.refused if fnmatchcase(own, pattern)]
            cannot += f" ({reasons[0] if reasons else 'taken is ' + ' or '.join(row.classes)})"
        remedy = "stay in torch (generate, compare and bench take the model itself)"
        if name == SAFETY_CHECKER:
            remedy = "export without it (slimdiff export --no-safety-checker, or ExportSettings(safety_checker=False))"
        elif name in _optional(index):
            remedy = f"take it out where images do not need it ({name}=None; in {INDEX} [null, null]), or {remedy}"
        raise InputError(f"{cannot}: {remedy}")


def _optional(index: Mapping[str, Any]) -> Sequence[str]:
    """Components that the pipeline of an index can do without."""
    import diffusers

    kind = getattr(diffusers, str(index.get("_class_name")).removeprefix("ORT"), None)
    return getattr(kind, "_optional_components", ())


def components_of(index: Mapping[str, Any]) -> dict[str, Component]:
    """The components that an index names, in the order in which they are exported."""
    return {name: row for name, row in _ROWS.items() if is_component(index.get(name))}


def autoencoder_of(index: Mapping[str, Any]) -> str | None:
    """The name of the component that makes images of latents; None of a pipeline that denoises images themselves."""
    return next((name for name in AUTOENCODERS if is_component(index.get(name))), None)


def denoiser_of(index: Mapping[str, Any]) -> str | None:
    """The name of the component of an index that denoises; None where there is none."""
    return next((name for name in DENOISERS if is_component(index.get(name))), None)


def denoiser_folder(folder: Path | str) -> Path:
    """Where the denoiser of an exported pipeline lies: `unet`, unless there is a graph or an engine of a transformer.

    Args:
        folder: of the pipeline.
    """
    places = [Path(folder) / name for name in DENOISERS]
    return next((place for place in places if _holds(place) or parts_of(place)), places[0])


def exported_entry(name: str, entry: Sequence[str], split: bool = False) -> list[str]:
    """What the index of an exported pipeline says of a component: optimum's class where it has one.

    Args:
        split: denoisers are in parts, which optimum has no class for: then the model's own is named.
    """
    row = _ROWS[name]
    return [_OPTIMUM, row.optimum] if row.optimum and not (split and row.parts) else list(entry)


def parts_of(folder: Path | str) -> dict[str, Path]:
    """The folders with the graphs, or engines, of a denoiser that is in parts; none where there is a whole one.

    Args:
        folder: of the denoiser, with its `config.json`.
    """
    found = {part: Path(folder) / part for part in PARTS}
    found = {part: at for part, at in found.items() if _holds(at)}
    return found if STEP in found and not _holds(Path(folder)) else {}


def shallow_of(unet: Path, *, engine: bool = False) -> Path | None:
    """The shallow graph that goes with a UNet's, or the folder of that graph's engine; None if there is none.

    Args:
        unet: the file or the folder of its graph or engine; in parts, the folder around them.
        engine: look for an engine.
    """
    folder = unet if unet.is_dir() else unet.parent
    folder = parts_of(folder).get(STEP, folder)
    found = folder / SHALLOW_ENGINE if engine else folder / SHALLOW
    return found if (found / ENGINE if engine else found).is_file() else None


def pipeline_around(place: Path) -> Path | None:
    """The folder of the pipeline whose denoiser a graph or an engine, or its folder, is: that folder itself, or the one
    around it; None if it is of none, or another component."""
    folder = (place.parent if place.suffix == ".onnx" else place).absolute()
    around = (folder, folder.parent) if folder.name in DENOISERS else (folder,)
    return next((one for one in around if (one / INDEX).is_file()), None)


def schedule_beside(place: Path) -> Path | None:
    """The file of the schedule that a graph or an engine, or its folder, goes with: there, or in its pipeline's folder;
    None if there is none."""
    folder = place.parent if place.suffix == ".onnx" else place
    places = (folder, pipeline_around(place))
    return next((one / FILE for one in places if one is not None and (one / FILE).is_file()), None)


def engine_folders(folder: Path) -> list[Path]:
    """The folders, below that of a denoiser's engine, with engines of its parts and of its shallow graph; the inner
    ones first."""
    parts = list(parts_of(folder).values())
    inner = (shallow_of(place / ENGINE, engine=True) for place in (*parts, folder))
    return [*(place for place in inner if place is not None), *parts]


def _holds(folder: Path) -> bool:
    """Whether there is a graph or an engine in a folder."""
    return (folder / GRAPH).is_file() or (folder / ENGINE).is_file()


def steering_folders(folder: Path) -> list[str]:
    """The names of the folders with ControlNets and adapters in an exported pipeline."""
    found = [name for name in STEERING if (folder / name).is_dir()]
    while (folder / (another := f"controlnet_{len(found)}")).is_dir():
        found.append(another)
    return found


def is_component(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names the library and class of a component that is there."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def without_safety_checker(index: Mapping[str, Any]) -> dict[str, Any]:
    """An index that says that images are not checked."""
    said = {SAFETY_CHECKER: [None, None], "requires_safety_checker": False}
    return {**index, **{name: value for name, value in said.items() if name in index}}


def read_config(path: Path | str) -> dict[str, Any]:
    """The `config.json` of the model that a folder's graph or engine, or this file, was made from.

    Raises:
        InputError: if it is not there, or no JSON.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        raise InputError(f"there is no {file}: a model in ONNX or an engine has its config.json beside it")
    try:
        return dict(manifest.read_json(file))
    except (InputError, ValueError, TypeError) as error:
        raise InputError(f"{file} is not a model's config: {error}") from error


def latent_scale(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, along a side, of an autoencoder, by its configuration.

    Raises:
        InputError: if it is another model's.
    """
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if not isinstance(blocks, list | tuple) or not blocks:
        raise InputError("the VAE's config.json has no block_out_channels: it is none of diffusers'")
    return 2 ** (len(blocks) - 1)
