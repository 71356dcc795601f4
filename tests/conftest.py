"""Settings shared by all tests.

The tests fork their ranks (see ranks.py). A fork copies memory but only one thread, so a parent that has started
torch's intra-op thread pool may leave a lock held for ever in the child: the parent keeps to one thread, always.
"""

import torch

torch.set_num_threads(1)
