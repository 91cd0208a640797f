"""What tests of routers and mixtures stand on, shipped for users too: begin with `tiny.model`.

Nothing in the package imports this room.
"""
