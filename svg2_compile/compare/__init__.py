"""``svg2 compare``: the same video dense and sparse, what differs, and what it took, as numbers and as a page.

``paired`` runs both, ``metrics`` and ``density`` measure, ``attention_maps`` looks into one attention, ``html`` writes
the page. Pictures and SSIM need the extra ``quality``.
"""
