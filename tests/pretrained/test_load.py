import pytest
import torch
from checkpoints import random_params

from rwkv_es.pretrained import checkpoint, load


def test_an_fp16_checkpoint_is_held_in_bf16_where_it_is_no_cpu_and_says_so(tmp_path, capsys):
    """The device "meta" stands for a GPU: there is nothing in its memory, but a dtype."""
    half = {name: tensor.half() for name, tensor in random_params(1, 64, 48).items()}
    checkpoint.save(tmp_path / "half.pth", half)
    dtypes = {}
    for device, dtype in (("meta", "auto"), ("meta", "fp32"), ("cpu", "auto")):
        loaded = load.load_base(str(tmp_path / "half.pth"), dtype=dtype, device=device)
        dtypes[device, dtype] = loaded.model.like.dtype, "rounded from 11 bits to 8" in capsys.readouterr().err
    assert dtypes == {
        ("meta", "auto"): (torch.bfloat16, True),
        ("meta", "fp32"): (torch.float32, False),
        ("cpu", "auto"): (torch.float32, False),
    }


@pytest.mark.parametrize(("version", "expected"), [("2.13.0", (False, False)), ("2.6.0+cu124", False)])
def test_a_gpu_never_adds_parts_of_a_product_in_bf16(monkeypatch, version, expected):
    class Products:
        allow_bf16_reduced_precision_reduction = allow_tf32 = True

    monkeypatch.setattr("torch.backends.cuda.matmul", Products)
    monkeypatch.setattr("torch.__version__", version)
    load.multiply_alike()
    assert Products.allow_bf16_reduced_precision_reduction == expected
    assert not Products.allow_tf32
