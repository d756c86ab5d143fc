"""The slim model of an offloaded denoiser: its weights are made while it is saved, and none is held."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from slimdiff.denoising.modules import working_copy
from slimdiff.denoising.offloading import Shards, present, shards_of
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Evidence, Site
from slimdiff.models import fitting_sites, slim_class_of
from slimdiff.plan import Plan
from slimdiff.progress import bar
from slimdiff.slimming.slim import Factors, changed_sites, check_ran, check_statistics, configuration, factorise
from slimdiff.statistics import Statistics
from slimdiff.storage.manifest import replacing, write_json
from slimdiff.storage.tensors import write_tensors

_STEM = "diffusion_pytorch_model"
MAX_SHARD_SIZE = "10GB"
"""diffusers' own default."""


@own_torch_state()
def slim_offloaded(
    denoiser: nn.Module, statistics: Statistics, plan: Plan, factors: Factors | None = None
) -> nn.Module:
    """The slim model of a plan, without its weights: `save_pretrained` makes them, one site after another, and writes
    each to its file at once. They are those that `slim_denoiser` gives.

    Args:
        denoiser: offloaded, in the dtype that is computed in; its files stay where they are until all is saved.
        factors: from `factorise`, if they are there already.

    Raises:
        InputError: as `slim_denoiser` does, or if the plan has what is fitted on calls of the slim model.
    """
    denoiser = working_copy(denoiser)
    check_statistics(denoiser, statistics)
    if plan.model_hash != statistics.model_hash:
        raise InputError("this plan was made for another model (its weights differ): plan again")
    check_plan(denoiser, plan)
    fitting_sites(denoiser, plan)
    changed = changed_sites(denoiser, plan)
    known = factors or factorise(denoiser, statistics, changed, plan.forms)
    check_ran(changed, known)
    source = _Source(denoiser, statistics, plan, known, changed)
    config = {"slim_plan": plan.recount().model_dump(mode="json"), **configuration(denoiser)}
    with no_init_weights(), init_empty_weights():
        slim = cast(Any, slim_class_of(denoiser)(**config))
    for name, parameter in slim.named_parameters():
        parameter.data = parameter.data.to(source.dtypes[name])
        parameter.requires_grad_(False)
    slim.register_forward_pre_hook(_refuse)
    slim.save_pretrained = partial(_save, slim, source)
    return slim.eval()


def check_plan(denoiser: nn.Module, plan: Plan) -> None:
    """Refuse a plan that an offloaded denoiser is not slimmed by; for any other denoiser, it passes.

    Raises:
        InputError: saying why.
    """
    if shards_of(denoiser) is not None and plan.is_fitted():
        raise InputError(
            "an offloaded denoiser's slim weights are made one site after another, and nothing is fitted on calls of "
            "the slim model: give a plan whose forms have compensate none, without slim sites of the group resnet"
        )


def _refuse(slim: nn.Module, _args: Any) -> None:
    if next(slim.parameters()).is_meta:
        raise InputError(
            f"this {type(slim).__name__} has no weights until it is saved: save it, and open it from there"
        )


class _Source:
    """Slim weights by name: a site's are made together when the first is asked for, and each is let go of."""

    def __init__(
        self, denoiser: nn.Module, statistics: Statistics, plan: Plan, factors: Factors, changed: list[Site]
    ) -> None:
        self.denoiser, self.statistics, self.plan, self.factors = denoiser, statistics, plan, factors
        self.shards = cast(Shards, shards_of(denoiser))
        self.state = denoiser.state_dict()
        self.dtypes = {name: self.shards.dtypes.get(name, tensor.dtype) for name, tensor in self.state.items()}
        self.changed = changed
        self.sites: dict[str, list[Site]] = {}
        for site in changed:
            for path, layer, _ in GROUPS[site.group].layers(denoiser.get_submodule(site.path)):
                for kind, _ in layer.named_parameters():
                    self.sites.setdefault(f"{site.path}.{path}.{kind}", []).append(site)

        self.restart()

    def __deepcopy__(self, _memo: Any) -> _Source:
        return self

    def restart(self) -> None:
        """Begin anew: no site is made."""
        self.left = {site.name for site in self.changed}
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        for site in self.sites.get(name, ()):
            if site.name in self.left:
                self.left.remove(site.name)
                self._make(site)
        if name in self.made:
            return self.made.pop(name)
        tensor = self.state[name]
        return self.shards[name] if tensor.is_meta else tensor

    def _make(self, site: Site) -> None:
        module = self.denoiser.get_submodule(site.path)
        rank = self.plan.sites[site.name].rank
        with present(module):
            evidence = Evidence(module, site, self.statistics, self.plan.forms)
            weights = GROUPS[site.group].slim(evidence, rank, self.factors[site.name])
            for name, tensor in weights.items():
                # Rounded first as the model in memory is, which is in the dtype that is computed in.
                rounded = tensor.to(module.get_parameter(name).dtype)
                self.made[f"{site.path}.{name}"] = rounded.to(self.dtypes[f"{site.path}.{name}"])


@own_torch_state()
def _save(
    slim: Any,
    source: _Source,
    save_directory: str | Path,
    *,
    variant: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **_: Any,
) -> None:
    """Write the slim model as diffusers' `save_pretrained` does, a tensor at a time; it takes the same arguments."""
    folder, stem = Path(save_directory), f"{_STEM}.{variant}" if variant else _STEM
    source.restart()
    like = {name: tensor.to("meta", source.dtypes[name]) for name, tensor in slim.state_dict().items()}
    pattern = f"{stem}{{suffix}}.safetensors"
    parts = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size, filename_pattern=pattern)
    folder.mkdir(parents=True, exist_ok=True)
    slim.save_config(folder)

    with bar(name="slim", unit="tensor", total=len(like)) as done:

        def read(name: str) -> Tensor:
            done.update()
            return source(name)

        for file, names in parts.filename_to_tensors.items():
            with replacing(folder / file, is_file=True) as temporary:
                write_tensors(temporary, {name: like[name] for name in names}, read)
    if parts.is_sharded:
        index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
        write_json(folder / f"{_STEM}.safetensors.index{f'.{variant}' if variant else ''}.json", index)
