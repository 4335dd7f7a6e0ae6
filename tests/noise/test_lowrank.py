import pytest
import torch

from rwkv_es.noise import lowrank
from rwkv_es.noise.lowrank import low_rank, weighted_sum


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_row_is_the_product_with_the_matrix_written_out(rank):
    x, weight = draws(5, 24, seed=1), draws(40, 24, seed=2)
    a, b = draws(3, 40, rank, seed=3), draws(3, 24, rank, seed=4)
    index, scale = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([0.1, -0.1, 0.1, 0.0, -0.1], dtype=torch.float64)
    y = x @ weight.T + low_rank(x, a, b, index, scale)
    for row in range(5):
        dense = weight + scale[row] * a[index[row]] @ b[index[row]].T
        torch.testing.assert_close(y[row], dense @ x[row])


@pytest.mark.parametrize("rank", [1, 4])
def test_weighted_sum_is_the_adjoint(rank):
    """<c, sum_s f_s dW_s x_s> in two ways: through low_rank, and through weighted_sum."""
    x, cotangent = draws(6, 24, seed=1), draws(40, seed=2)
    a, b, f = draws(6, 40, rank, seed=3), draws(6, 24, rank, seed=4), draws(6, seed=5)
    one_x = x[:1].expand(6, -1)
    applied = low_rank(one_x, a, b, torch.arange(6), f).sum(0) @ cotangent
    collected = cotangent @ weighted_sum(a, b, f) @ x[0]
    torch.testing.assert_close(applied, collected)


def test_weighted_sum_with_a_batch_of_heads_is_one_sum_per_head():
    a, b, f = draws(5, 2, 8, 3, seed=1), draws(5, 2, 6, 3, seed=2), draws(5, seed=3)
    dense = torch.zeros(2, 8, 6, dtype=torch.float64)
    for d in range(5):
        for h in range(2):
            for c in range(3):
                dense[h] += f[d] * torch.outer(a[d, h, :, c], b[d, h, :, c])
    torch.testing.assert_close(weighted_sum(a, b, f), dense)


def test_the_sum_has_the_same_bits_for_any_number_of_threads_whatever_the_library_does(monkeypatch):
    a, b, f = (draws(*shape, seed=seed).float() for seed, shape in enumerate([(6, 40, 2), (6, 24, 2), (6,)]))
    before, expected = torch.get_num_threads(), weighted_sum(a, b, f)
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, w: real(x, w) + 1e-3 * (torch.get_num_threads() > 1))
    lowrank._is_same_with_one_thread.cache_clear()
    torch.set_num_threads(2)
    try:
        assert torch.equal(weighted_sum(a, b, f), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        lowrank._is_same_with_one_thread.cache_clear()
