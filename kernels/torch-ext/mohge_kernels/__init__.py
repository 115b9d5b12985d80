"""Kernels for experts of different width."""
