"""Tile sizes by device: ``lookup.py`` is asked at every launch, ``tables.py`` keeps files, ``defaults.py`` serves
where there is none."""
