import os

os.environ['CUDA_VISIBLE_DEVICES'] = ''                            # tolerances and times here are a CPU's

import torch  # noqa: E402

# The suite's tensors are small: a second thread gains little, and beside any other busy process two threads that wait
# for each other cost ten times the time.
torch.set_num_threads(1)
