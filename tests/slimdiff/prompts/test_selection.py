"""A selection has the moments of what it was selected from, and embeddings are the prompts' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPTS

from slimdiff.errors import InputError
from slimdiff.prompts.selection import embed, moment_error, select


def clusters(sizes: list[int], spread: float = 0.01) -> torch.Tensor:
    """Rows around as many corners of a cube as there are sizes."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.eye(8)[i] + spread * torch.randn(n, 8, generator=generator) for i, n in enumerate(sizes)]
    return torch.cat(rows)


def test_every_kind_is_there_as_often_as_in_the_whole():
    sizes = [200, 100, 60, 40]
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    counts = torch.bincount(owner[select(clusters(sizes), 20)], minlength=4)
    assert (counts - torch.tensor([10, 5, 3, 2])).abs().max() <= 1


@pytest.mark.parametrize("count", [4, 20, 100])
def test_moments_are_closer_than_any_random_picks(count):
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7)) + 3
    generator = torch.Generator().manual_seed(1)
    by_chance = [moment_error(rows, torch.randperm(400, generator=generator)[:count].tolist()) for _ in range(20)]
    assert moment_error(rows, select(rows, count)) < min(by_chance)


def test_the_first_of_more_are_what_fewer_would_be():
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    chosen = select(rows, 60)
    assert select(rows, 13) == chosen[:13] and sorted(chosen) == list(range(60))
    assert moment_error(rows, chosen) == pytest.approx(0, abs=1e-5)


def test_scale_and_place_do_not_matter():
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(2))
    assert select(1000 * rows - 70, 9) == select(rows, 9)


def test_copies_do_not_stop_it():
    assert sorted(select(torch.ones(4, 3), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 5])
def test_more_than_there_are(count):
    with pytest.raises(InputError, match="1 to 4"):
        select(torch.eye(4), count)


def test_embeddings_do_not_depend_on_the_batch(pipeline):
    """Padding to the longest of a batch must not show."""
    whole = embed(pipeline, PROMPTS)
    single = embed(pipeline, PROMPTS, batch=1)
    assert whole.shape == (len(PROMPTS), 32) and torch.allclose(whole, single, atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(len(PROMPTS)))
    assert torch.pdist(whole).min() > 1e-3


def test_several_text_encoders_stand_side_by_side(pipeline):
    one = pipeline.text_encoder, pipeline.tokenizer
    two = SimpleNamespace(text_encoder=one[0], tokenizer=one[1], text_encoder_2=one[0], tokenizer_2=one[1])
    assert torch.equal(embed(two, PROMPTS), embed(pipeline, PROMPTS).repeat(1, 2))


def test_no_text_encoder():
    with pytest.raises(InputError, match="no text encoder"):
        embed(SimpleNamespace(), PROMPTS)
