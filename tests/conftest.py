"""One thread: the networks here are too small for more, and CI machines have few cores."""

import torch

torch.set_num_threads(1)
