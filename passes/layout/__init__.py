"""The token-layout analysis: axes.py is its domain, rules/ what operators do, interpreter.py runs a graph.

The face is passes/token_layout.py.
"""
