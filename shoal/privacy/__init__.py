"""Secure groups and differential privacy: see README.md."""
