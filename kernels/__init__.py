"""Triton kernels, their reference, packing and dispatch. Imports nothing of the rest."""
