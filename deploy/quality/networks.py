"""The networks of the metrics, opened from files by path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimdiff.errors import InputError, require

_INCEPTION_PIXELS = 299
_TOGETHER = 16
"""Images that go through a network at once."""


def to_tensor(image: Any) -> Tensor:
    """A PIL image as `[3, H, W]`, uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def open_ms_ssim(_: Path | None) -> Callable[[Any, Any], float]:
    """Multi-scale structural similarity (Wang et al. 2003) of two images with sides over 160 pixels."""
    require("torchmetrics", "metrics")
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    def similarity(a: Any, b: Any) -> float:
        first, second = (to_tensor(image)[None].double() for image in (a, b))
        return float(ms_ssim(first, second, data_range=255.0))

    return similarity


def _alexnet() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for channels, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2))


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


class _Fire(nn.Module):
    """SqueezeNet's block: few channels, then two convolutions of them side by side."""

    def __init__(self, channels: int, squeezed: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, width, 1)
        self.expand3x3 = nn.Conv2d(squeezed, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def _squeezenet() -> nn.Sequential:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool()),
        *(_Fire(64, 16, 64), _Fire(128, 16, 64), pool()),
        *(_Fire(128, 32, 128), _Fire(256, 32, 128), pool()),
        *(_Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)),
    )


BACKBONES: dict[str, Callable[[], nn.Sequential]] = {"alex": _alexnet, "vgg": _vgg16, "squeeze": _squeezenet}
"""The `features` of torchvision's AlexNet, VGG16 and SqueezeNet 1.1, by the names that LPIPS calls them."""


def open_lpips(weights: Path | None) -> Callable[[Any, Any], float]:
    """LPIPS (Zhang et al. 2018) of two images, by torchmetrics, which ships the learned heads of each backbone.

    Which backbone it is shows in the file.
    """
    assert weights is not None
    require("torchmetrics", "metrics")
    from torchmetrics.functional.image import lpips

    state = _read_state(weights)
    features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
    with torch.device("meta"):
        backbones = {net: build() for net, build in BACKBONES.items()}
    shapes = {name: tensor.shape for name, tensor in features.items()}
    net = next((n for n, b in backbones.items() if shapes == {k: v.shape for k, v in b.state_dict().items()}), None)
    if net is None:
        raise InputError(
            f"{weights} is no state of torchvision's AlexNet, VGG16 or SqueezeNet 1.1, which lpips needs: name one"
        )
    backbone = backbones[net]
    backbone.load_state_dict({k: v.float() for k, v in features.items()}, strict=True, assign=True)
    theirs = lpips._get_tv_model_features
    lpips._get_tv_model_features = lambda net, pretrained=False: backbone  # theirs needs torchvision
    try:
        network = lpips._NoTrainLpips(net=net)  # type: ignore[arg-type]
    finally:
        lpips._get_tv_model_features = theirs

    def distance(a: Any, b: Any) -> float:
        first, second = (to_tensor(image)[None].float() / 255 for image in (a, b))
        return float(network(first, second, normalize=True))

    return distance


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises anything for what is no pickle, some of it without a word
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} cannot be read as weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise InputError(f"{file} holds no state of a module: name a file of weights alone")
    return state


def open_clip_score(weights: Path | None) -> Callable[[Any, str], float]:
    """CLIPScore (Hessel et al. 2021) of an image and its caption, 100 max(cos, 0), by torchmetrics."""
    require("torchmetrics", "metrics")
    from torchmetrics.functional.multimodal import clip_score

    model, processor = _read_clip(weights)
    # Transformers answers with an output where torchmetrics takes the embedding itself.
    embeds: Any = SimpleNamespace(
        config=model.config,
        get_image_features=lambda *args: _embedding(model.get_image_features(*args)),
        get_text_features=lambda *args: _embedding(model.get_text_features(*args)),
        to=lambda _: embeds,
    )
    return lambda image, caption: float(clip_score(to_tensor(image), caption, lambda: (embeds, processor)))


def open_features(weights: Path | None) -> Callable[[Sequence[Any]], Tensor]:
    """Features of images for FID and KID: of Inception in TorchScript, or of CLIP's vision tower for a folder.

    Inception's images are brought to 299 x 299 by the bicubic filter of PIL, which takes all pixels into account
    (Parmar et al. 2022, clean-fid); its own resizing inside then changes nothing.
    """
    assert weights is not None
    require("torchmetrics", "metrics")
    if weights.is_dir():
        model, processor = _read_clip(weights)

        def embed(images: Sequence[Any]) -> Tensor:
            pixels = processor(images=[to_tensor(image) for image in images], return_tensors="pt")["pixel_values"]
            return _embedding(model.get_image_features(pixels))
    else:
        try:
            network = torch.jit.load(str(weights), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise InputError(
                f"{weights} is no TorchScript file (inception-2015-12-05.pt is one) and no folder of a CLIP model"
            ) from error

        def embed(images: Sequence[Any]) -> Tensor:
            pixels = torch.stack([_resized(image) for image in images])
            return network(pixels, return_features=True).flatten(1)

    @torch.no_grad()
    def features(images: Sequence[Any]) -> Tensor:
        starts = range(0, len(images), _TOGETHER)
        try:
            return torch.cat([embed(images[start : start + _TOGETHER]).double() for start in starts])
        except (RuntimeError, AttributeError) as error:  # of a TorchScript file that is another network
            last = str(error).strip().splitlines()[-1]
            raise InputError(f"{weights} gives no features of images as Inception's file does: {last}") from error

    return features


def _resized(image: Any) -> Tensor:
    """`[3, 299, 299]`, float32 from 0 to 255."""
    from PIL import Image

    size = (_INCEPTION_PIXELS, _INCEPTION_PIXELS)
    channels = [Image.fromarray(np.asarray(c, dtype=np.float32)) for c in image.convert("RGB").split()]
    planes = [np.asarray(channel.resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(planes).clip(0, 255))


def _read_clip(folder: Path | None) -> tuple[Any, Any]:
    """The model and the processor in a folder."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    assert folder is not None
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind != "clip":
            raise ValueError(f"its model_type is {kind}")
        how: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32, "output_loading_info": True}
        model, loaded = CLIPModel.from_pretrained(folder, **how)
        if absent := sorted(key for key in loaded["missing_keys"] if not key.endswith("position_ids")):
            raise ValueError(f"its weights lack {absent[0]}, and {len(absent) - 1} more")
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(folder, local_files_only=True), tokenizer)
    except Exception as error:  # transformers raises anything for odd folders
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} is no whole CLIP model of transformers with its processor: {reason}") from error
    return model.eval().requires_grad_(False), processor


def _embedding(output: Any) -> Tensor:
    """The projected embedding: what transformers before 5 gives itself, and later in the place of the pooled output."""
    return output if isinstance(output, Tensor) else output.pooler_output
