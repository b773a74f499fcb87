import os

import torch

# The suite's tensors are small: a second thread gains little, and beside any other busy process two threads that wait
# for each other cost ten times the time.
torch.set_num_threads(1)


def pytest_configure(config):
    """
    Tolerances and times are a CPU's, so that tests and the scripts they start see no GPU; only where tests/test_cuda.py
    is all that was asked for, they do. This is before CUDA starts, and in every process of pytest-xdist.
    """
    if not all('test_cuda.py' in argument for argument in config.args):
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
