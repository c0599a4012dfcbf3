"""``python -m svg2_compile.cli``: the command ``svg2`` without its script."""

from svg2_compile.cli import app

if __name__ == "__main__":
    app()
