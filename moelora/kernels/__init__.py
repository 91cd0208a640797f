"""The arithmetic of a mixture. Begin with `reference.py` (what is computed), then `api.py` (which way is taken)."""
