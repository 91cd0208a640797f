"""Routers decide, for each token, which experts act and with what weight: one router a file, beside its config.

Begin with `base.py` (the interface); `learned.py` is the default.
"""
