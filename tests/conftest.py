"""What all tests share: MKL's mode as a command has it, one thread, so that tests do not fight for cores; slow tests
are asked for, and tests of last bits skip where the machine's library does not keep to them."""

import pytest

from rwkv_es.model.batch import choose_blas_mode

choose_blas_mode()  # before torch is loaded

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "measures_memory" not in item.keywords)  # before others fill the heap
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long; run it with --slow"))


def pytest_runtest_setup(item):
    for marker in ("bits", "promise"):
        if item.get_closest_marker(marker):
            from machine import reason

            if text := reason(marker):
                pytest.skip(text)
