"""Where tensors are, and all communication: the only package that talks to other ranks."""
