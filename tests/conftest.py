"""What all tests share: one thread, so that tests do not fight for cores; slow tests are asked for."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "measures_memory" not in item.keywords)  # before others fill the heap
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long; run it with --slow"))
