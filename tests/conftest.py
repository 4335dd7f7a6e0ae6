"""What all tests share: where the data sets are, and one thread, so that tests do not fight for cores."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long; run it with --slow"))


@pytest.fixture
def data_dir():
    folder = Path(os.environ.get("RWKV_ES_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the data sets are not in {folder}; say where with RWKV_ES_DATA")
    return folder
