"""A safetensors file that is written tensor by tensor, for models that are larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a file as `safetensors.torch.save_file` does, with one tensor in memory at a time.

    Args:
        like: tensors of the right shapes and dtypes by name, perhaps on `meta`.
        read: gives each tensor by its name; they are asked for in the order of `like`, but for wider dtypes first.
    """
    # What is wide comes first, so that everything is aligned.
    names = sorted(like, key=lambda name: -like[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + like[name].nbytes
        header[name] = {
            "dtype": _NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name).detach().to("cpu", like[name].dtype).contiguous()
            assert tensor.shape == like[name].shape, name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
