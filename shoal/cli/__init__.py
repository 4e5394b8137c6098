"""The commands of `shoal`. Each is thin: it reads its arguments, calls a room, and says what came of it.

A command's module imports nothing heavy before the command runs, so that `shoal --help` answers at once.
"""
