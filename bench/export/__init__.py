"""Benchmarks of the offline door: what a file costs to make and to load, and how fast it runs."""
