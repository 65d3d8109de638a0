import os
import warnings

import pytest
import torch

import torchfuse  # before torchtune, which cannot be imported otherwise where the tree is not installed

with warnings.catch_warnings():
    # Kept libraries warn while they are imported; in tests, our own warnings are errors.
    warnings.simplefilter("ignore")
    import torchtune
    import transformers

assert torchfuse and torchtune
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# Tests run one to a core, on models so small that threads would spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
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
