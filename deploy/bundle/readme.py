"""The README of a bundle: what is in it, what it needs, and the command that runs it."""

from __future__ import annotations

from pathlib import Path

from deploy.bundle.description import Description

_TEXT = """# A diffusion model for {target}

Written by `slimdiff bundle`. It makes images from text, in diffusers, with the denoiser in {runtimes}.

## Run it

```
pip install {packages}
slimdiff generate . --prompt "a lighthouse at dusk" --out ../image.png
```

or in Python:

```python
import deploy

pipeline = deploy.load(".")
print(pipeline.chosen.why)
pipeline("a lighthouse at dusk").images[0].save("../image.png")
```

Python {python}. Whatever opens the bundle holds every file against the sizes and hashes in `manifest.json` first, and
refuses it if one differs or was added, so let images go elsewhere. That finds damage and mix-ups; it does not tell who
made the bundle: take it from a place you trust, above all where it has engines, which are machine code for a GPU.

## Denoisers

Samples are those of one call: with guidance, an image takes two. `*` is any number.

| name | folder | precision | samples x height x width | runs in |
| --- | --- | --- | --- | --- |
{rows}

The first one that this machine has a runtime for is taken; `--runtime`, and `--height` with `--width`, choose another.
`slimdiff inspect .` tells what it was made from. Licences are in `licenses/`.
"""


def write_readme(file: Path, description: Description) -> None:
    """Write it; the command in it is run by our tests."""
    rows = []
    for d in description.denoisers:
        where = f", on {', '.join(d.capabilities)}" if d.is_engine else ""
        rows.append(f"| {d.name} | `{d.folder}` | {d.precision} | {d.shape} | {', '.join(d.runtimes)}{where} |")
    needed = [f"'{name}{version}'" for name, version in description.packages.items()]
    runtimes = dict.fromkeys(runtime for d in description.denoisers for runtime in d.runtimes)
    text = _TEXT.format(
        target="one device" if description.target == "edge" else "servers",
        runtimes=" or ".join(runtimes),
        packages=" ".join(needed),
        python=description.python,
        rows="\n".join(rows),
    )
    file.write_text(text, encoding="utf-8")
