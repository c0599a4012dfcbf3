"""How an attention is spelled and masked in a graph. The face is find.py; masks.py, emit_padding.py: padding."""
