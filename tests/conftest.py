import os
import warnings

import pytest
import torch

with warnings.catch_warnings():
    # Kept libraries warn while they are imported; in tests, our own warnings are errors.
    warnings.simplefilter("ignore")
    import torchtune
    import transformers

assert torchtune
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_configure(config):
    # Workers share the cores; more threads than that only wait for each other.
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(17)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    from torch import nn

    doctest_namespace |= {"torch": torch, "nn": nn}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
