"""Directories that would have diffusers or transformers run code, or read no tensors, are refused before that."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from slimdiff import InputError
from slimdiff.loading.pipelines import load_pipeline

CODE = "open({!r}, 'w').write('this ran')\n"


class Writes:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "this ran"))


@pytest.fixture
def model(slim_directory, tmp_path) -> Path:
    return shutil.copytree(slim_directory, tmp_path / "model")


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there if any code ran."""
    return tmp_path / "mark.txt"


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(model: Path, told: str) -> None:
    with pytest.raises(InputError) as error:
        load_pipeline(model)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_pickles_beside_safetensors_are_not_opened(model, mark):
    for name in ("diffusion_pytorch_model.bin", "model.ckpt", "x.pt"):
        torch.save(Writes(mark), model / "unet" / name)
    torch.save(Writes(mark), model / "text_encoder" / "pytorch_model.bin")
    load_pipeline(model)
    assert not mark.exists()


@pytest.mark.parametrize("ending", ["bin", "pt", "ckpt", "pth"])
def test_pickles_in_place_of_safetensors(model, mark, ending):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(Writes(mark), weights.with_suffix(f".{ending}"))
    weights.unlink()
    refused(model, "is a pickle, which can run code when opened")
    assert not mark.exists()


def test_a_pickle_under_the_name_of_safetensors(model, mark):
    torch.save(Writes(mark), model / "unet" / "diffusion_pytorch_model.safetensors")
    refused(model, "is not a whole safetensors file")
    assert not mark.exists()


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 59) + b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}',
        b"",
    ],
)
def test_headers_of_safetensors_that_lie(model, head):
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(head)
    refused(model, "is not a whole safetensors file")


@pytest.mark.parametrize("name", ["../../other.safetensors", "/etc/passwd", "weights.bin", "unet/../x.safetensors"])
def test_shards_lie_beside_their_index(model, name):
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
    refused(model, "weights are safetensors files beside it")


def test_code_beside_the_model_is_not_run(model, mark):
    """Each of these is a way in which diffusers takes code from a directory."""
    for name in ("None.py", "mine.py", "unet/mine.py"):
        (model / name).write_text(CODE.format(str(mark)) + "class Mine: pass\n")
    refused(model, "None.py would be run")
    (model / "None.py").unlink()
    change_json(model / "model_index.json", _class_name=["mine", "Mine"])
    refused(model, "names the pipeline ['mine', 'Mine']")
    change_json(model / "model_index.json", _class_name="StableDiffusionPipeline", unet=["mine", "Mine"])
    refused(model, "asks for mine.Mine")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (["os", "system"], "asks for os.system"),
        (["antigravity", "x"], "asks for antigravity.x"),
        (["importlib", "x"], "asks for importlib.x"),
        (["transformers", "AutoModel"], "no class that belongs there"),
        (["diffusers", "AutoModel"], "no class that belongs there"),
        (["diffusers", "DiffusionPipeline"], "no class that belongs there"),
        (["transformers", "pipeline"], "no class that belongs there"),
        (["slimdiff.models", "InputError"], "no class that belongs there"),
        (["slimdiff.models", "inspect"], "no class that belongs there"),
        (["diffusers", "NoSuchModel"], "which this diffusers does not have"),
        (["diffusers"], "where a library and its class are named"),
        ([1, 2], "where a library and its class are named"),
    ],
)
def test_classes_are_diffusers_transformers_or_ours(model, entry, told):
    change_json(model / "model_index.json", unet=entry)
    refused(model, told)


def test_components_lie_in_the_directory(model):
    change_json(model / "model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]})
    refused(model, "which is outside the directory")


def test_kernels_and_other_models_are_not_fetched(model):
    config = model / "text_encoder" / "config.json"
    text = config.read_text()
    for name in ("attn_implementation", "_attn_implementation"):
        change_json(config, **{name: "somebody/kernels"})
        refused(model, "asks for the attention 'somebody/kernels'")
        config.write_text(text)
    change_json(config, text_config={"attn_implementation": "somebody/kernels:function"})
    refused(model, "asks for the attention")
    config.write_text(text)
    (model / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    refused(model, "adapter_config.json, which names another model")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"a": ' * 100_000, "\ud800"])
def test_an_index_that_is_none(model, text):
    (model / "model_index.json").write_text(text, errors="surrogatepass")
    refused(model, "model_index.json")
