"""The search for better tile sizes: ``search.py`` measures what ``space.py`` offers on what ``workloads.py`` makes."""
