"""Serving a pipeline with NVIDIA's Triton Inference Server: a model repository, and the server's container."""

from deploy.triton.repository import check_served, write_repository
from deploy.triton.settings import TritonSettings

__all__ = ["TritonSettings", "check_served", "write_repository"]
