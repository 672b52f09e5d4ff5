"""Packed 4-bit weight -> dense weight."""
