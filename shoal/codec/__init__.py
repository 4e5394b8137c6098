"""Tensors in fewer bytes: see README.md."""
