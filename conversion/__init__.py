"""Conversion of dense and homogeneous checkpoints into expert groups."""
