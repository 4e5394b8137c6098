"""Attacks that a run can be put to: what protection is worth is shown by what breaks without it."""
