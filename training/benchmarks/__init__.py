"""Measurements of speed: of a training step and decoding, of several ranks, of the simulator."""
