"""Plug-in points of hosts, one folder each. Nothing of the package imports them; none needs its host to be imported."""
