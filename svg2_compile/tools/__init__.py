"""What the commands do, one file a command, and what they need; ``svg2_compile.cli`` is their syntax."""
