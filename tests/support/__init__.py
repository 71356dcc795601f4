"""What the tests share: ranks, layouts, models, cases, the witness of the wire, the float64 reference.

Ranks are forked, and their parent must not have opened a device. torch's autograd starts one thread for each
device at the first backward of a process, and from then on refuses backward in its forks. FakeTensorMode, and
so torch.compile, claims devices (by a guard that does nothing) where a CUDA build finds none: the first
backward after it would be the end of forking. Autograd counts devices once in a process, so it counts here.
"""

import torch

if not torch.cuda.is_available():
    torch.zeros((), requires_grad=True).backward()
