"""PyTorch modules as JAX functions: `torch.export` takes a module apart into ATen operations, a table has each of them in JAX.

exported.py asks torch for the graph, run.py runs it on JAX arrays, the other files are the table. Only exported.py imports torch.
"""
