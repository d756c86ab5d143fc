"""The algebra against what it claims to minimise."""

from __future__ import annotations

import pytest
import torch

from slimdiff.algebra import elimination, low_rank


def activations(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Correlated, unequal columns: a case in which whitening matters."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=g, dtype=torch.float64) * torch.logspace(0, -2, columns)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64) @ mixing + 0.3


def test_roots_invert_each_other_on_a_singular_moment():
    x = activations(5, 12, 0)  # rank 5
    moment = x.T @ x / 5
    root, inverse = low_rank.roots(moment)
    torch.testing.assert_close(root.mT @ root, moment, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(root @ inverse @ root, root, atol=1e-9, rtol=1e-7)


def test_query_key_beats_any_other_pair_of_its_rank_and_tells_its_error():
    q, k = activations(400, 16, 1), activations(300, 16, 2)
    bases = low_rank.query_key((q.T @ q / 400)[None], (k.T @ k / 300)[None])
    scores = q @ k.T
    previous = float("inf")
    for rank in (2, 4, 8, 12, 16):
        left, right = bases.left[0, :, :rank], bases.right[0, :, :rank]
        error = float(((q @ left @ (k @ right).T - scores) ** 2).sum() / (scores**2).sum())
        assert error == pytest.approx(float(bases.tail[rank]), rel=1e-5, abs=1e-12)
        assert error < previous
        previous = error
        if rank < 16:
            u, s, vt = torch.linalg.svd(scores, full_matrices=False)
            best = float((s[rank:] ** 2).sum() / (s**2).sum())
            assert error == pytest.approx(best, rel=1e-5)  # Eckart-Young: nothing of this rank is better


def test_value_output_is_the_best_of_its_rank_for_one_head():
    z = activations(500, 16, 3)
    output = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    moment = z.T @ z / 500
    bases = low_rank.value_output(moment[None], output)
    target = z @ output.T
    singular = torch.linalg.svdvals(target)
    for rank in (1, 4, 9, 16):
        basis = bases.left[..., :rank]
        solved = low_rank.solve_output(moment, output, basis)
        error = ((z @ basis[0] @ solved.T - target) ** 2).sum() / (target**2).sum()
        best = (singular[rank:] ** 2).sum() / (singular**2).sum()
        torch.testing.assert_close(error, best, atol=1e-9, rtol=1e-4)
        torch.testing.assert_close(bases.tail[rank], best, atol=1e-9, rtol=1e-4)


def test_joint_solve_over_heads_is_no_worse_than_head_by_head():
    z = activations(800, 32, 5)
    output = torch.randn(20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    moment = z.T @ z / 800
    basis = low_rank.value_output(low_rank.head_blocks(moment, 4), output).left[..., :3]
    mixed = torch.block_diag(*basis)
    alone = []
    for h in range(4):
        part = slice(h * 8, h * 8 + 8)
        alone.append(low_rank.solve_output(moment[part, part], output[:, part], basis[h : h + 1]))
    target = z @ output.T

    def error(weight: torch.Tensor) -> float:
        return float(((z @ mixed @ weight.T - target) ** 2).sum())

    assert error(low_rank.solve_output(moment, output, basis)) < 0.999 * error(torch.cat(alone, 1))


def test_an_output_narrower_than_a_head():
    z = activations(200, 16, 7)
    output = torch.randn(4, 16, dtype=torch.float64)
    moment = z.T @ z / 200
    bases = low_rank.value_output(moment[None], output)
    assert float(bases.tail[4]) < 1e-12
    solved = low_rank.solve_output(moment, output, bases.left[..., :4])
    torch.testing.assert_close(z @ bases.left[0, :, :4] @ solved.T, z @ output.T, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 4])
def test_feed_forward_curve_is_the_error_that_the_solved_projection_makes(block):
    h = activations(600, 24, 8)
    down = torch.randn(10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    moment = h.T @ h / 600
    order, tail = elimination.elimination_order(moment, down, block)
    assert sorted(order.tolist()) == list(range(24))
    assert float(tail[24]) == 0 and bool((tail[:-1] >= tail[1:]).all())
    target = h @ down.T
    for rank in (4, 8, 16, 20):
        kept = order[:rank]
        solved = elimination.solve_down(moment, down, kept)
        error = float(((h[:, kept] @ solved.T - target) ** 2).sum() / (target**2).sum())
        assert error == pytest.approx(float(tail[rank]), rel=0.02, abs=1e-4)


def test_a_value_basis_is_orthonormal_whatever_the_moment():
    """Weights keep their size: whitening by a nearly singular moment would blow them up beyond fp16."""
    z = activations(500, 16, 14) * torch.logspace(0, -4, 16, dtype=torch.float64)
    output = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(15))
    basis = low_rank.value_output(low_rank.head_blocks(z.T @ z / 500, 2), output).left
    eye = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-9, rtol=1e-9)


def test_leverage_curve_is_the_error_that_the_solved_projection_makes():
    h = activations(600, 24, 8)
    down = torch.randn(10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    order, tail = elimination.leverage_order(h.T @ h / 600, down)
    assert sorted(order.tolist()) == list(range(24))
    for rank in (0, 4, 8, 16, 20, 24):
        kept = order[:rank]
        solved = elimination.solve_down(h.T @ h / 600, down, kept)
        error = float(((h[:, kept] @ solved.T - h @ down.T) ** 2).sum() / ((h @ down.T) ** 2).sum())
        assert error == pytest.approx(float(tail[rank]), rel=0.02, abs=1e-4)


def test_elimination_beats_magnitude_and_random_channels():
    h = activations(600, 24, 10)
    down = torch.randn(10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    moment = h.T @ h / 600
    order, _ = elimination.elimination_order(moment, down)

    def error(kept: torch.Tensor) -> float:
        solved = elimination.solve_down(moment, down, kept)
        return float(((h[:, kept] @ solved.T - h @ down.T) ** 2).sum())

    magnitude = down.norm(dim=0).argsort(descending=True)
    chance = torch.randperm(24, generator=torch.Generator().manual_seed(12))
    assert error(order[:8]) < error(magnitude[:8])
    assert error(order[:8]) < error(chance[:8])


def test_a_dead_and_a_constant_channel_are_survived():
    h = activations(100, 12, 13)
    h[:, 3], h[:, 5] = 0.0, 1.0
    down = torch.randn(6, 12, dtype=torch.float64)
    order, tail = elimination.elimination_order(h.T @ h / 100, down)
    assert order[-1] == 3 and float(tail[11]) < 1e-6
    assert bool(torch.isfinite(tail).all())


def test_larger_blocks_choose_about_as_well_as_one_channel_at_a_time():
    """On correlated channels behind a nonlinearity: what a large feed-forward loses by its blocks."""
    generator = torch.Generator().manual_seed(0)
    n = 1088
    mixing = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)[:, None]
    h = torch.nn.functional.gelu(torch.randn(4 * n, n, generator=generator) @ mixing)
    moment = (h.T @ h / len(h)).double()
    down = torch.randn(n // 8, n, generator=generator).double()
    exact, blocks = elimination.elimination_order(moment, down, 1), elimination.elimination_order(moment, down)
    for rank in (n // 4, n // 2, 3 * n // 4):
        assert float(blocks[1][rank]) <= 1.03 * float(exact[1][rank])
