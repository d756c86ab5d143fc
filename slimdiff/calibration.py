"""Second moments of a denoiser's inner activations, streamed over real guided trajectories: nothing else is stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimdiff.adapters import fused_adapters, refuse_adapters
from slimdiff.artifacts import replacing
from slimdiff.errors import InputError
from slimdiff.sites import Site, attention_linears, feed_forward_linears, find_sites, resnet_layers
from slimdiff.trajectory import Call, Inputs, Sampling, denoiser_name, predict, sample_images, usable_inputs


class CalibrationSettings(BaseModel):
    """What the denoiser is watched doing."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(64, ge=1)
    """How many prompts, taken from the front of the list."""
    sampling: Sampling = Sampling()
    """How their images are made."""
    centre_keys: bool = True
    """Take key moments about each image's mean key, which softmax does not see."""


@dataclass
class Statistics:
    """Sums of outer products per site, float32 on the denoiser's device.

    `moments` maps a name to a matrix: for a site `S` of `H` heads of `d` dimensions,
    `S.query` and `S.key` of shape `[H, d, d]` for `query_key`; `S` of shape `[H d, H d]` for what `to_out` receives
    (`value_output`), and `[n, n]` for what the down projection of `n` channels receives (`feed_forward`), or the second
    convolution at each pixel (`resnet`).
    `tokens` counts the rows in each sum.
    """

    model_hash: str
    moments: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, outer: Tensor, tokens: int) -> None:
        if name in self.moments:
            self.moments[name] += outer
        else:
            self.moments[name] = outer
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def mean(self, name: str) -> Tensor:
        """The second moment E[x x^T] by name, float64 on the CPU.

        Raises:
            InputError: if these statistics do not know the site, or hold values that are not finite.
        """
        if name not in self.moments:
            raise InputError(
                f"the statistics hold nothing for {name}: calibrate this model, with inputs that make it run"
            )
        moment = self.moments[name].double().cpu() / self.tokens[name]
        if not torch.isfinite(moment).all():
            raise InputError(f"the statistics of {name} are not finite: the model overflows; calibrate it in float32")
        return moment

    def save(self, path: Path) -> None:
        """One safetensors file; counts and provenance are in its metadata."""
        meta = {"model_hash": self.model_hash, "tokens": self.tokens, "made_from": self.made_from}
        tensors = {k: v.cpu().contiguous() for k, v in self.moments.items()}
        with replacing(path, is_file=True) as temporary:
            save_file(tensors, temporary, metadata={"slimdiff": json.dumps(meta)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            InputError: if the file is no such thing.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["slimdiff"])
                moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own error type, metadata a TypeError or KeyError
            raise InputError(f"{path} is not a statistics file of slimdiff: {error}") from error
        return cls(meta["model_hash"], moments, meta["tokens"], meta["made_from"])


def weights_hash(module: nn.Module) -> str:
    """A fingerprint of a module's weights and their names: it sees any changed weight (identity, not security)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).double()
        ramp = torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64, device=flat.device)
        digest.update(f"{flat.sum().item():.9e}{(flat * ramp).sum().item():.9e}".encode())
    return digest.hexdigest()


def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    settings: CalibrationSettings | None = None,
    *,
    progress: str | None = "calibrate",
) -> Statistics:
    """Collect statistics while the pipeline makes images of the prompts (both branches of guidance, every timestep).

    Args:
        prompts: prompts, or mappings of the pipeline's arguments per image (see `slimdiff.trajectory`).

    Raises:
        InputError: if there is no prompt, the pipeline needs other arguments, an adapter is attached to the denoiser,
            or nothing in it can be slimmed.
    """
    settings = settings or CalibrationSettings()
    chosen = usable_inputs(prompts)[: settings.samples]
    if not chosen:
        raise InputError("there is no prompt to calibrate with: give at least one non-empty line")
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    with watching(denoiser, centre_keys=settings.centre_keys) as statistics:
        sample_images(pipeline, chosen, settings.sampling, output_type="latent", progress=progress)
    statistics.made_from = {"prompts": len(chosen), "settings": settings.model_dump()}
    if fused := fused_adapters(pipeline):
        statistics.made_from["fused_adapters"] = fused
    return statistics


def calibrate_on_calls(denoiser: nn.Module, calls: Sequence[Call], *, centre_keys: bool = True) -> Statistics:
    """Collect statistics from calls of the denoiser alone, for models whose pipeline cannot be run or does not exist.

    Args:
        calls: as `record_calls` gives them, or made by hand; arguments as the denoiser's `forward` names them.

    Raises:
        InputError: if there is no call, an adapter is attached to the denoiser, or nothing in it can be slimmed.
    """
    if not calls:
        raise InputError("there is no call to calibrate with: record at least one (slimdiff.trajectory.record_calls)")
    with watching(denoiser, centre_keys=centre_keys) as statistics:
        for call in calls:
            predict(denoiser, call)
    statistics.made_from = {"calls": len(calls), "settings": {"centre_keys": centre_keys}}
    return statistics


@contextmanager
def watching(denoiser: nn.Module, *, centre_keys: bool = True) -> Iterator[Statistics]:
    """Statistics of every site, which each forward pass of the denoiser in this block adds to.

    Raises:
        InputError: if an adapter is attached to the denoiser, or nothing in it can be slimmed.
    """
    refuse_adapters(denoiser)
    sites, left_dense = find_sites(denoiser)
    if not sites:
        reasons = "; ".join(sorted({d["reason"] for d in left_dense})) or "it has no attention or feed-forward module"
        raise InputError(f"{type(denoiser).__name__} has nothing to slim: {reasons}")
    statistics = Statistics(weights_hash(denoiser))
    with torch.no_grad(), observing(denoiser, sites, statistics, centre_keys=centre_keys):
        yield statistics


@contextmanager
def observing(
    denoiser: nn.Module, sites: Sequence[Site], statistics: Statistics, *, centre_keys: bool
) -> Iterator[None]:
    """Hook the sites' linear layers, so that every forward pass adds to the statistics."""
    modules = dict(denoiser.named_modules())
    handles = []
    for site in sites:
        module = modules[site.path]
        if site.group == "query_key":
            query, key, _, _ = attention_linears(module)
            handles.append(query.register_forward_hook(_per_head(statistics, f"{site.name}.query", site, False)))
            handles.append(key.register_forward_hook(_per_head(statistics, f"{site.name}.key", site, centre_keys)))
        elif site.group == "value_output":
            handles.append(attention_linears(module)[3].register_forward_pre_hook(_inputs(statistics, site.name)))
        elif site.group == "resnet":
            handles.append(resnet_layers(module).second.register_forward_pre_hook(_pixels(statistics, site.name)))
        else:
            handles.append(feed_forward_linears(module)[1].register_forward_pre_hook(_inputs(statistics, site.name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _per_head(statistics: Statistics, name: str, site: Site, centre: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        x = output.detach().float()
        if centre:  # over an image's tokens: softmax does not see what all keys of an image have in common
            x = x - x.mean(dim=1, keepdim=True)
        x = x.reshape(-1, site.heads, site.dense_rank).transpose(0, 1)
        statistics.add(name, x.transpose(1, 2) @ x, x.shape[1])

    return hook


def _inputs(statistics: Statistics, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float().flatten(0, -2)
        statistics.add(name, x.T @ x, x.shape[0])

    return hook


def _pixels(statistics: Statistics, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().float().transpose(0, 1).flatten(1)
        statistics.add(name, x @ x.T, x.shape[1])

    return hook
