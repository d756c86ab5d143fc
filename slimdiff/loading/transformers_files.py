"""Tokenizers, whose files transformers 4 and 5 read and write differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
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
