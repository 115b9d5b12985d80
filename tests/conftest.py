"""One thread for all tests: their tensors are too small to share, and threads would only wait for one another."""

import torch


torch.set_num_threads(1)
