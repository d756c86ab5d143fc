"""The chain from a recipe to a report, and the command line.

`deploy.run_build(recipe, name, folder)` is what `slimdiff build` runs, with a recipe of `deploy.recipe.recipe`.
`deploy.load(path)` opens a bundle as a diffusers pipeline.
"""

from slimdiff.lazy import attach

# `__init__.pyi` lists the names. torch and diffusers take seconds, so a name is imported when it is first used.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
