"""Recorded routing replayed on many devices, by a model of the machine or by real processes: `mohge simulate`."""
