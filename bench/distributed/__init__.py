"""Several devices: what they cost by a formula, and how evenly heads lie on them."""
