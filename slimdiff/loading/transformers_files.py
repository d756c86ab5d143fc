"""Files that transformers 4 and 5 read and write differently: tokenizers, and the weights of CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from tokenizers.models import BPE

from slimdiff.errors import InputError


def write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` beside the `tokenizer.json` of a byte-pair tokenizer that was saved there.

    transformers 5 writes `tokenizer.json` alone; 4 reads CLIP's tokenizer from the other two alone.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE) and not (folder / "vocab.json").exists():
        model.save(str(folder))


def check_vocabulary(kind: Any, folder: Path) -> None:
    """See that a tokenizer's folder has a vocabulary: without one, transformers 5 opens a tokenizer of no words.

    Raises:
        InputError: if there is none.
    """
    if not issubclass(kind, transformers.PreTrainedTokenizerBase):
        return
    names = {*kind.vocab_files_names.values(), "tokenizer.json"}
    if kind.vocab_files_names and not any((folder / name).is_file() for name in names):
        raise InputError(f"{folder} holds no vocabulary ({', '.join(sorted(names))}): copy the directory whole")


def check_text_weights(kind: Any, weights: Sequence[Path]) -> None:
    """See that this transformers finds the weights of a CLIP text encoder by their names.

    transformers 5 writes them without the prefix `text_model.` and reads both; 4 would leave all of them random.

    Raises:
        InputError: if not.
    """
    if kind is not transformers.CLIPTextModel or int(transformers.__version__.split(".")[0]) > 4:
        return
    for file in weights:
        with safe_open(file, framework="pt") as opened:
            if any(not name.startswith("text_model.") for name in opened.keys()):  # noqa: SIM118  (no mapping)
                raise InputError(
                    f"{file} was written by transformers 5, and {transformers.__version__} does not find its weights: "
                    "pip install 'transformers>=5'"
                )
