"""The server's container: a compose file that makes an image with diffusers in it, and starts it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.triton.settings import TritonSettings


def write_compose(file: Path, settings: TritonSettings, engines: Sequence[str]) -> None:
    """Write the compose file, which takes `models` beside it for the model repository.

    Args:
        file: `compose.yaml`.
        settings: image and device.
        engines: what the engines in the repository were made for, as its text says.
    """
    environment = Environment(
        loader=PackageLoader("deploy.triton"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    packages = {name: version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")}
    template = environment.get_template("compose.yaml.j2")
    text = template.render(image=settings.image, device=settings.device, engines=engines, **packages)
    file.write_text(text, encoding="utf-8")
