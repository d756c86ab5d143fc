"""What calibration leaves behind: sums of outer products per site, in memory or in a file, and how such sums are added.

A moment is symmetric, so of `E[x x^T]` only the upper block triangle is kept: half the memory and half the work.
"""

from __future__ import annotations

import json
import math
from collections import Counter, UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slimdiff.errors import InputError
from slimdiff.storage.manifest import replacing

# Rows per strip of a triangle. It belongs to the file format; larger strips waste memory, smaller ones speed.
STRIP = 256
SCHEMA = 2
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def triangle_size(width: int) -> int:
    """Numbers in the upper block triangle of a `[width, width]` matrix."""
    return sum(min(STRIP, width - start) * (width - start) for start in range(0, width, STRIP))


def strips(triangle: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """The triangle's rows from `start` on, `STRIP` of them, right of the diagonal block's left edge: views."""
    offset = 0
    for start in range(0, width, STRIP):
        rows, columns = min(STRIP, width - start), width - start
        yield start, triangle[offset : offset + rows * columns].view(rows, columns)
        offset += rows * columns


def unfold(triangle: Tensor, width: int) -> Tensor:
    """The whole symmetric matrix, float64 on the CPU."""
    full = torch.empty(width, width, dtype=torch.float64)
    for start, strip in strips(triangle, width):
        end = start + len(strip)
        full[start:end, start:] = strip
        full[end:, start:end] = full[start:end, end:].T
        block = full[start:end, start:end]
        block.copy_((block + block.T) / 2)
    return full


@dataclass
class Statistics:
    """Sums over the rows x that a site saw, each row times the weight of its timestep.

    For a site `S` of `H` heads of `d` dimensions:

    | name | group | `moments`: sum of x x^T | `firsts`: sum of x |
    | --- | --- | --- | --- |
    | `S.query`, `S.key` | `query_key`: keys about their image's mean | `[H, d, d]` per head | |
    | `S.key_mean` | `query_key`: those means, one per image | `[H, d, d]` per head | |
    | `S` | `value_output`: what `to_out` receives | triangle of `[H d, H d]` | `[H d]` |
    | `S.value` | `value_output`: the value projection's output | `[H, d, d]` per head | |
    | `S` | `feed_forward`: what the down projection of `n` channels receives | triangle of `[n, n]` | `[n]` |
    | `S` | `resnet`: what the second convolution of `n` channels receives at a pixel | triangle of `[n, n]` | `[n]` |

    Moments are float32 where they are collected on the denoiser's device, first moments float64. Read from a file, both
    are read by name when asked for, so that a model's statistics need not fit into memory.

    Attributes:
        tokens: rows in each sum.
        weights: the sum of their weights; equal to `tokens` where all timesteps weigh the same.
        population: the sum of the weights of all rows that they were selected from; `weights` where nothing is said.
        sensitivities: by site name, if they were measured (`slimdiff.planning`): another budget needs no forward pass.
        macs: by module path, multiply-accumulates of one sample that its dense layers cost, and under `""`
            the whole model's; if they were counted.
        int8_errors: by path of a linear or convolution, what int8 costs it alone, if that was measured; `macs` has the
            multiply-accumulates of these, too.
    """

    def __repr__(self) -> str:
        rows = max(self.tokens.values(), default=0)
        return f"Statistics(model {self.model_hash[:12]}, {len(self.moments)} moments of up to {rows} rows)"

    model_hash: str
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    firsts: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    sensitivities: dict[str, float] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)
    population: dict[str, float] = field(default_factory=dict)
    int8_errors: dict[str, float] = field(default_factory=dict)

    def add_rows(self, name: str, rows: Tensor, weight: float = 1.0, of: int | None = None) -> None:
        """Add rows `[R, n]`, float32, to a triangle and a first moment; `of` is how many they were selected from."""
        width = rows.shape[1]
        if name not in self.moments:
            assert isinstance(self.moments, dict) and isinstance(self.firsts, dict)
            self.moments[name] = rows.new_zeros(triangle_size(width))
            self.firsts[name] = torch.zeros(width, dtype=torch.float64, device=rows.device)
        for start, strip in strips(self.moments[name], width):
            strip.addmm_(rows[:, start : start + len(strip)].T, rows[:, start:], alpha=weight)
        self.firsts[name].add_(rows.sum(0), alpha=weight)
        self._count(name, len(rows), weight, of)

    def add_heads(
        self, name: str, rows: Tensor, weight: float = 1.0, tokens: int | None = None, of: int | None = None
    ) -> None:
        """Add rows `[H, R, d]`, float32, to one moment per head.

        Args:
            tokens: how many of the rows count, if some were zeroed because nothing attends to them.
            of: how many such rows they were selected from.
        """
        if name not in self.moments:
            assert isinstance(self.moments, dict)
            heads, _, d = rows.shape
            self.moments[name] = rows.new_zeros(heads, d, d)
        self.moments[name].baddbmm_(rows.mT, rows, alpha=weight)
        self._count(name, rows.shape[1] if tokens is None else tokens, weight, of)

    def _count(self, name: str, tokens: int, weight: float, of: int | None) -> None:
        self.tokens[name] = self.tokens.get(name, 0) + tokens
        self.weights[name] = self.weights.get(name, 0.0) + weight * tokens
        self.population[name] = self.population.get(name, 0.0) + weight * (tokens if of is None else of)

    def mean(self, name: str) -> Tensor:
        """The second moment E[x x^T] by name, float64 on the CPU: `[n, n]`, or `[H, d, d]` per head.

        Raises:
            InputError: if these statistics do not know the site, or hold values that are not finite.
        """
        moment = self._read(self.moments, name)
        full = moment.double().cpu() if moment.ndim > 1 else unfold(moment.cpu(), len(self.firsts[name]))
        return self._finite(name, full.div_(self.weights[name]))

    def first(self, name: str) -> Tensor:
        """The first moment E[x] by name, float64 `[n]` on the CPU.

        Raises:
            InputError: as `mean` does.
        """
        return self._finite(name, self._read(self.firsts, name).cpu() / self.weights[name])

    def _read(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in tensors or not self.weights.get(name):
            raise InputError(
                f"the statistics hold nothing for {name}: calibrate this model, with inputs that make it run"
            )
        return tensors[name]

    @staticmethod
    def _finite(name: str, value: Tensor) -> Tensor:
        # A sum shows any value that is not finite, without another matrix of the same size.
        if not math.isfinite(float(value.sum())):
            raise InputError(f"the statistics of {name} are not finite: the model overflows; calibrate it in float32")
        return value

    def check_finite(self) -> None:
        """Raises:
        InputError: naming the first site, in the order in which they ran, that saw a value that is not finite.
        """
        for name, moment in self.moments.items():
            self._finite(name, self.firsts.get(name, moment))

    def merge(self, *others: Statistics) -> Statistics:
        """These and other statistics of the same model together, as if all had been collected in one run.

        A selection of tokens weighs what it was selected from: each part counts by its prompts, however few or many of
        their tokens it took. Where every token was taken, sums are simply added. Sums are taken by name when asked for;
        sensitivities and MACs are the first's that has them.

        Raises:
            InputError: if the others are another model's, or were collected in another way.
        """
        parts = (self, *others)
        for other in others:
            if other.model_hash != self.model_hash:
                raise InputError("statistics of different models cannot be merged: their weights differ")
            if _way(other.made_from) != _way(self.made_from):
                raise InputError(
                    f"statistics collected in different ways cannot be merged: {_way(self.made_from)} and "
                    f"{_way(other.made_from)}"
                )
        made_from = dict(self.made_from)
        for count in ("prompts", "calls"):
            if count in made_from:
                made_from[count] = sum(part.made_from.get(count, 0) for part in parts)
        weights = added([part.weights for part in parts])
        population = added([{**part.weights, **part.population} for part in parts])
        # With these, each part's share of the weights is its share of the population, and their total is what it was.
        factors = [
            {
                name: (part.population.get(name, weight) / weight) / (population[name] / weights[name])
                for name, weight in part.weights.items()
                if weight
            }
            for part in parts
        ]
        return Statistics(
            self.model_hash,
            _summed([part.moments for part in parts], factors),
            _summed([part.firsts for part in parts], factors),
            added([part.tokens for part in parts]),
            weights,
            next((part.sensitivities for part in parts if part.sensitivities), {}),
            next((part.macs for part in parts if part.macs), {}),
            made_from,
            population,
            next((part.int8_errors for part in parts if part.int8_errors), {}),
        )

    def save(self, path: Path, **more: Any) -> None:
        """One safetensors file, written tensor by tensor; all that is no tensor is in its metadata, as is `more`."""
        meta = {name: value for name, value in vars(self).items() if name not in ("moments", "firsts")}
        meta |= {"schema": SCHEMA, "strip": STRIP, **more}
        with replacing(path, is_file=True) as temporary:
            # First moments first: they are float64, and what is written before them must not misalign them.
            _write(temporary, {"first": self.firsts, "moment": self.moments}, {"slimdiff": json.dumps(meta)})

    @classmethod
    def load(cls, path: Path, owner: Any = None) -> Statistics:
        """Open what `save` wrote.

        Args:
            owner: whatever must live as long as the file.

        Raises:
            InputError: if the file is no such thing.
        """
        meta = read_metadata(path)
        known = {name: meta[name] for name in cls.__dataclass_fields__ if name in meta}
        return cls(**known, moments=Stored(path, "moment", owner), firsts=Stored(path, "first", owner))


def read_metadata(path: Path) -> dict[str, Any]:
    """What a statistics file holds besides tensors.

    Raises:
        InputError: if it is no statistics file, or one of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["slimdiff"])
            meta["model_hash"], meta["tokens"]
    except Exception as error:  # safetensors raises its own error type, metadata a TypeError or KeyError
        raise InputError(f"{path} is not a statistics file of slimdiff: {error}") from error
    if (meta.get("schema"), meta.get("strip")) != (SCHEMA, STRIP):
        raise InputError(f"{path} holds statistics of another version of slimdiff: calibrate again")
    return meta


class Lazy(UserDict[str, Tensor]):
    """Tensors by name, each made when it is asked for; `data` holds the names alone."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self.data = dict.fromkeys(names)  # type: ignore[assignment]
        self.make = make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.data:
            raise KeyError(name)
        return self.make(name)


class Stored(Lazy):
    """Tensors of one kind in a safetensors file, read when asked for; `owner` lives as long as they do."""

    def __init__(self, path: Path, kind: str, owner: Any = None) -> None:
        self.path = path
        self.kind = kind
        self.owner = owner
        self.version = _version(path)
        with safe_open(path, framework="pt") as file:
            names = (key.partition("/") for key in file.keys())  # noqa: SIM118
            super().__init__((name for prefix, _, name in names if prefix == kind), self._read)

    def _read(self, name: str) -> Tensor:
        with self._opened() as file:
            return file.get_tensor(f"{self.kind}/{name}")

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it."""
        with self._opened() as file:
            return file.get_slice(f"{self.kind}/{name}").get_shape()

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with safe_open(self.path, framework="pt") as file:
            if _version(self.path) != self.version:
                raise InputError(f"{self.path} was written anew while it was read: give the command again")
            yield file


def _version(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def _summed(parts: Sequence[Mapping[str, Tensor]], factors: Sequence[Mapping[str, float]]) -> Lazy:
    """Sums of several mappings' tensors by name, each times its own factor."""

    def total(name: str) -> Tensor:
        own = [(part[name], each.get(name, 1.0)) for part, each in zip(parts, factors, strict=True) if name in part]
        terms = [tensor if factor == 1 else tensor * factor for tensor, factor in own]
        return sum((term.to(terms[0].device) for term in terms[1:]), terms[0])

    return Lazy((name for part in parts for name in part), total)


def _way(made_from: dict[str, Any]) -> dict[str, Any]:
    """What statistics must have in common to be added: all but which prompts, which noise, and how many at a time."""
    free = ("samples", "tokens_per_dimension", "memory_limit")
    settings = {k: v for k, v in made_from.get("settings", {}).items() if k not in free}
    if "sampling" in settings:
        settings["sampling"] = {k: v for k, v in settings["sampling"].items() if k not in ("seed", "batch")}
    return {**settings, **{k: made_from[k] for k in ("fused_adapters", "lora") if k in made_from}}


def added(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of several mappings' numbers by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _write(path: Path, kinds: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str]) -> None:
    """A safetensors file with one tensor in memory at a time; each is named `kind/name`.

    The header has all shapes and comes first, so room is left for it (spaces at its end are allowed) and it is
    written last.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    names = [(kind, name) for kind, tensors in kinds.items() for name in tensors]
    room = len(json.dumps(header)) + sum(len(json.dumps(f"{kind}/{name}")) + 160 for kind, name in names)
    room += -room % 8
    offset = 0
    with path.open("wb") as file:
        file.write(bytes(8 + room))
        for kind, name in names:
            tensor = kinds[kind][name].detach().cpu().contiguous()
            file.write(tensor.numpy().data)
            end = offset + tensor.numel() * tensor.element_size()
            header[f"{kind}/{name}"] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))
