import os
from pathlib import Path

import checkpoints
import pytest
import torch


@pytest.fixture
def random_params():
    """The function that builds a random model in the official layout."""
    return checkpoints.random_params


@pytest.fixture
def model_path(tmp_path):
    """A small random model (2 layers, 128 channels, 96 tokens, fp32) saved as an official .pth file."""
    path = tmp_path / "random.pth"
    torch.save(checkpoints.random_params(), path)
    return path


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real task data; its place is RWKV_ES_DATA (default ../shared/data beside the repository)."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("RWKV_ES_DATA", root / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no task data at {folder}; set RWKV_ES_DATA to a folder that has it")
    return folder
