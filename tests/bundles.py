"""A bundle's description, for tests that need no graphs in it."""

from __future__ import annotations

from deploy.bundle.description import Denoiser, Description

GRAPH = Denoiser(
    name="onnx",
    folder="unet",
    vae=".",
    runtimes=["onnxruntime"],
    precision="fp32",
    batch=2,
    height=16,
    width=16,
    capabilities=[],
    version=None,
)
DESCRIPTION = Description(target="edge", python=">=3.10", packages={}, denoisers=[GRAPH])
