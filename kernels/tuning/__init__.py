"""Tile sizes by device: ``lookup.py`` is asked at every launch, ``search.py`` measures, ``tables.py`` keeps files."""
