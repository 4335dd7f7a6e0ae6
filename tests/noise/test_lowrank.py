import pytest
import torch

from rwkv_es.noise.lowrank import perturbed_linear, weighted_sum


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_row_is_the_product_with_the_matrix_written_out(rank):
    x, weight = draws(5, 24, seed=1), draws(40, 24, seed=2)
    a, b = draws(3, 40, rank, seed=3), draws(3, 24, rank, seed=4)
    index, scale = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([0.1, -0.1, 0.1, 0.0, -0.1], dtype=torch.float64)
    y = perturbed_linear(x, weight, a, b, index=index, scale=scale)
    for row in range(5):
        dense = weight + scale[row] * a[index[row]] @ b[index[row]].T
        torch.testing.assert_close(y[row], dense @ x[row])


@pytest.mark.parametrize("rank", [1, 4])
def test_weighted_sum_is_the_adjoint(rank):
    """<c, sum_s f_s dW_s x_s> in two ways: through perturbed_linear, and through weighted_sum."""
    x, cotangent = draws(6, 24, seed=1), draws(40, seed=2)
    a, b, f = draws(6, 40, rank, seed=3), draws(6, 24, rank, seed=4), draws(6, seed=5)
    one_x = x[:1].expand(6, -1)
    zero = torch.zeros(40, 24, dtype=torch.float64)
    applied = perturbed_linear(one_x, zero, a, b, index=torch.arange(6), scale=f).sum(0) @ cotangent
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
