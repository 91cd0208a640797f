"""Orthogonal adapters, detectors, calibrated gates, and the stacks that put them on a model."""
