"""The room that reads the outside world: adapters, hubs, model families. The only one that imports transformers.

Begin with `adapters.py` (what comes in), `targets.py` (where it goes), `hub` (from where).
"""
