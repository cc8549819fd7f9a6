"""Attention kernels for TPUs (Pallas, Mosaic)."""
