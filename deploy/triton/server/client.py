"""Ask the server for an image: `python client.py --prompt "a red barn" --out barn.png`.

Needs `pip install "tritonclient[http]" pillow`.
"""

from __future__ import annotations

import argparse

import numpy as np
import tritonclient.http as triton
from PIL import Image

TYPES = {"prompt": "BYTES", "negative_prompt": "BYTES", "seed": "INT64", "steps": "INT32", "guidance": "FP32"}
"""Inputs of the model `text_to_image`; all but the prompt may be left out."""


def generate(url: str, timeout: float = 300, **values: str | int | float) -> np.ndarray:
    """One image, uint8 `[height, width, 3]`, of the server at `url` (host:port)."""
    inputs = []
    for name, value in values.items():
        tensor = triton.InferInput(name, [1], TYPES[name])
        dtype = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32}[TYPES[name]]
        tensor.set_data_from_numpy(np.array([value], dtype=dtype))
        inputs.append(tensor)
    with triton.InferenceServerClient(url, network_timeout=timeout) as client:
        return client.infer("text_to_image", inputs).as_numpy("image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="(default: the server's)")
    parser.add_argument("--guidance", type=float, help="(default: the server's)")
    parser.add_argument("--out", required=True, metavar="PNG")
    parser.add_argument("--url", default="localhost:8000")
    values = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, url = values.pop("out"), values.pop("url")
    Image.fromarray(generate(url, **values)).save(out)


if __name__ == "__main__":
    main()
