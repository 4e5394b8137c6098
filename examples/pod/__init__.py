"""Recipes for a pod: `shoal train examples/pod/NAME.py:task --mesh …`; each has a small size and that of its paper."""
