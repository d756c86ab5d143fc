"""Networks of the metrics with random weights, saved as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import TOKENIZER
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from deploy.quality.networks import BACKBONES


class TinyInception(torch.nn.Module):
    """Takes what NVIDIA's file takes: images from 0 to 255 and `return_features`. Features are means of quarters."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = torch.nn.functional.adaptive_avg_pool2d(x / 255, 2).flatten(1)
        return features if return_features else features[:, :1]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for net, suffix in (("alex", ".pth"), ("squeeze", ".safetensors"), ("vgg", ".safetensors")):
        torch.manual_seed(0)
        state = {f"features.{name}": tensor for name, tensor in BACKBONES[net]().state_dict().items()}
        state["classifier.6.bias"] = torch.zeros(4)
        files[net] = folder / f"{net}{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(state, files[net])
    files["inception"] = folder / "inception.pt"
    torch.jit.script(TinyInception()).save(str(files["inception"]))
    files["clip"] = folder / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**side, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = {**side, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(files["clip"])
    tokenizer.save_pretrained(files["clip"])
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(files["clip"])
    return files
