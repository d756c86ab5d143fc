"""Reading YAML that others wrote: safe, without keys that are written twice, and without aliases that blow up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimdiff.errors import InputError

_MOST_NODES = 100_000


def read_yaml(path: Path) -> Any:
    """The content of a recipe's file.

    Raises:
        InputError: if it is not there, cannot be read, or is not such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {error}") from error
    try:
        return _parse(text)
    except Exception as error:  # beside YAMLError, what Python's parsers say of odd dates and numbers, or deep nests
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _parse(text: str) -> Any:
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"with its aliases it has over {_MOST_NODES} entries")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Entries of a node, those behind aliases counted wherever they are named."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        nested = isinstance(node, yaml.CollectionNode)
        sizes[id(node)] = 1 + (sum(_size(n, sizes) for n in inner) if nested else 0)
    found = sizes[id(node)]
    if found is None:
        raise yaml.YAMLError("one of its aliases names what it is in itself")
    return found


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key that is written twice is an error, not a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
