"""`python -m fastattn`, the same as the command `fastattn`."""

from fastattn.cli.main import app

if __name__ == "__main__":
    app(prog_name="fastattn")
