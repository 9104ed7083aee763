"""`python -m deradiff`, and what `accelerate launch -m deradiff` starts in every process."""

from deradiff.cli import app

if __name__ == "__main__":
    app()
