"""Attention kernels for NVIDIA GPUs (Pallas, and cuDNN)."""
