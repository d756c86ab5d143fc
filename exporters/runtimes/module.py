"""What the drop-ins have in common: they are modules to diffusers, and their sessions stay where they are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from exporters.graphs.reading import steps_of
from exporters.layout import read_config
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session
from slimdiff.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class RuntimeModule(nn.Module):
    """A module that computes in a session. Moving or casting it does nothing.

    Args:
        session: of a graph that `slimdiff export` wrote, or an engine of it.
        config: of the model that it was made from.

    Attributes:
        dtype: of the graph, not of the arithmetic inside.
        device: the CPU, where tensors are handed over.
    """

    tensor: ClassVar[str]
    """The input or output whose dtype is the module's."""

    def __init__(self, session: Session, config: Any):
        super().__init__()
        self.session = session
        self.config = config
        self.dtype: torch.dtype = getattr(torch, session.dtypes[self.tensor])
        self.device = torch.device("cpu")
        # Whoever asks a module for its dtype by its first parameter gets the graph's.
        self.anchor = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)

    @classmethod
    def open(cls, path: Path | str, runtime: str = "onnxruntime", threads: int | None = None) -> Self:
        """Open a folder with `model.onnx` (or `model.engine`) and `config.json`, or the `model.onnx` in it.

        Raises:
            InputError: if it is no such module of ours.
            MissingPackageError: if the runtime is not here; see `open_session`.
        """
        return cls(open_session(path, runtime, threads), read_config(path))

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Self:
        """Open the component of that name in a pipeline's folder; see `open`."""
        return cls.open(folder / name, runtime, threads)

    def _apply(self, fn: Any, recurse: bool = True) -> RuntimeModule:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another module of the same session, which has no state of its own."""
        return copy.copy(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise NotInRuntimeError(
                f"{name} is for a model in torch, and this {type(self).__name__} runs {self.__dict__['session'].source}"
                if "session" in self.__dict__
                else f"{type(self).__name__} has no {name}"
            ) from None


class NotInRuntimeError(InputError, AttributeError):
    """A method or attribute of torch's module that a graph cannot have. Whoever asks by `hasattr` is told no."""


def refuse_torchs_own(pipeline: Any) -> None:
    """diffusers would leave out what it cannot save, with a warning, and looks for LoRA layers in a text encoder."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise InputError("this pipeline runs graphs, which save_pretrained does not know: copy the folder it is from")

    pipeline.save_pretrained = save_pretrained
    encode = getattr(type(pipeline), "encode_prompt", None)
    if encode is None:
        return

    @wraps(encode)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if inspect.signature(encode).bind(self, *args, **kwargs).arguments.get("lora_scale") is not None:
            raise InputError(
                "cross_attention_kwargs has a scale, of LoRA layers, and this pipeline's graphs have none: leave it out"
            )
        return encode(self, *args, **kwargs)

    pipeline.encode_prompt = MethodType(encode_prompt, pipeline)


def answer(session: Session, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a session on its inputs by name, of any dtype and device; see `feed_of`.

    Returns:
        its outputs by name, on the CPU, in its own dtypes.
    """
    return {name: torch.from_numpy(array) for name, array in session.run(feed_of(session, tensors)).items()}


def feed_of(session: Session, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """A session's inputs as it takes them, from tensors of any dtype and device.

    Raises:
        InputError: for other inputs than the session has, or a shape that it was not made for.
    """
    text, takes = tensors.get("encoder_hidden_states"), session.inputs.get("encoder_hidden_states", ())
    if text is not None and text.ndim == len(takes) == 3 and isinstance(takes[1], int) and text.shape[1] != takes[1]:
        raise InputError(
            f"the prompt has {text.shape[1]} tokens, and {session.source} takes {takes[1]}: give that many"
        )
    _check(session, tensors)
    dtypes = {name: getattr(torch, session.dtypes[name]) for name in tensors}
    return {name: tensor.detach().to("cpu", dtypes[name]).contiguous().numpy() for name, tensor in tensors.items()}


def _check(session: Session, tensors: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(session.inputs):
        raise InputError(f"{session.source} takes {', '.join(session.inputs)}; given were {', '.join(tensors)}")
    counts: dict[str, int] = {}

    def fits(size: int, dim: int | str) -> bool:
        if isinstance(dim, int):
            return size == dim
        step, side = steps_of(dim)
        return size % step == 0 and counts.setdefault(side, size // step) == size // step

    for name, takes in session.inputs.items():
        value = tensors[name]
        shape = tuple(value.shape)
        if (
            value.is_floating_point()
            and session.dtypes[name].startswith("int")
            and bool((value != value.round()).any())
        ):
            raise InputError(f"{session.source} takes whole numbers for {name}, given were {value.flatten().tolist()}")
        if len(shape) != len(takes) or not all(map(fits, shape, takes)):
            raise InputError(
                f"{name} has shape {shape}, but {session.source} takes "
                + ", ".join(f"{n} ({', '.join(map(str, s))})" for n, s in session.inputs.items())
                + ": ask for images of that size and number, or export for others (slimdiff export --height --width "
                "--batch, or --dynamic batch,size)"
            )
