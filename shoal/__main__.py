"""`python -m shoal`: the same as the command `shoal`."""

import os
import sys


def main() -> None:
    """The command line. Ctrl-C while it is still being loaded ends it without a word."""
    try:
        from shoal.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        run()
    except SystemExit as ended:
        if ended.code not in (130, 143):
            raise
        # Stopped, and all is put away. Threads of libraries that still compile may crash an interpreter that goes under them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended.code))


if __name__ == "__main__":
    main()
