"""What a user can set: ``config.py`` is the value, ``options.py`` the spellings, ``presets.py`` known models."""
