"""Kernels for sound, for Lepton."""
