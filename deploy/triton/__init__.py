"""Serving a pipeline with NVIDIA's Triton Inference Server: a model repository, and the server's container."""

from deploy.triton.repository import write_repository
from deploy.triton.settings import TritonSettings

__all__ = ["TritonSettings", "write_repository"]
