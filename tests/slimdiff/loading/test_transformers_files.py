"""What transformers 4 and 5 write and read differently, in one of them as in the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizerFast

from deploy.artifacts.files import save_pipeline
from slimdiff import InputError
from slimdiff.loading.pipelines import load_pipeline


@pytest.fixture
def model(pipeline, tmp_path) -> Path:
    save_pipeline(pipeline, tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_tokenizer_is_read_by_either(model, pipeline):
    folder = model / "tokenizer"
    assert {"vocab.json", "merges.txt"} <= {file.name for file in folder.iterdir()}
    expected = pipeline.tokenizer(["a large red circle top left", "zebra"]).input_ids
    for file in folder.glob("tokenizer.json"):  # of which transformers 4 knows nothing
        file.unlink()
    found = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert found(["a large red circle top left", "zebra"]).input_ids == expected


def test_a_tokenizer_without_words_is_refused(model):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (model / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="tokenizer holds no vocabulary"):
        load_pipeline(model)
