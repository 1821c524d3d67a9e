"""`python -m fastattn`, and the command `fastattn`."""

import sys


def main() -> None:
    try:
        from fastattn.cli.main import app  # here, so that Ctrl-C at the very beginning is no traceback either

        app(prog_name="fastattn")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
