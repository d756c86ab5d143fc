"""A vocabulary in CLIP's format for a small world's captions; both benchmark models train their tokenizer by it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers

_LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789,.-'!?")


def write_vocabulary(texts: Iterable[str], folder: Path, size: int, splitter: Any) -> None:
    """Train byte pairs on texts, and write `vocab.json` and `merges.txt` as CLIP's tokenizer reads them.

    Args:
        size: of the vocabulary at most, last letters and special tokens aside.
        splitter: the `tokenizers` pre-tokenizer that cuts texts into words.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=_LETTERS, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    state = json.loads(bpe.to_str())["model"]
    vocabulary = dict(state["vocab"])
    for letter in _LETTERS:  # unknown words are spelled, so every letter must also exist as a word's last
        vocabulary.setdefault(letter + "</w>", len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
