"""Kernels for accelerators and the random numbers they share with their references; jax alone."""
