"""Graph passes, one a file: pure functions of a graph and a configuration, which know no run time.

In the order of the pipeline: inline_subgraphs, token_layout, attention/find, time_inputs, decide_sites, specialise,
balance_heads, canonical, sparsify, hoist_centroids.
"""
