"""The optimizer's memory: which parameters there are, their state, how gradients come in, checkpoints."""
