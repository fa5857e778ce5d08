"""DSpark speculative decoding in JAX: block drafting, lossless verification, drafter training."""

__version__ = "0.1.0"
