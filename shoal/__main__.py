"""`python -m shoal`: the same as the command `shoal`."""

import sys


def main() -> None:
    """The command line. Ctrl-C while it is still being loaded ends it without a word."""
    try:
        from shoal.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
