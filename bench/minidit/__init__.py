"""How the small video transformer of ``svg2_compile.minidit`` is trained: on synthetic video, made as it trains.

``data`` and ``textures`` make the videos, ``stages`` is the curriculum, ``train`` trains, ``export`` writes weights.
"""
