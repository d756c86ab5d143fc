"""Tiny random members of every family of denoisers, in their real pipelines where those can be small."""

from __future__ import annotations

from families.family import Family
from families.images import IMAGES
from families.newer_transformers import NEWER
from families.transformers import TRANSFORMERS
from families.videos import VIDEOS

FAMILIES: dict[str, Family] = {**IMAGES, **VIDEOS, **TRANSFORMERS, **NEWER}
