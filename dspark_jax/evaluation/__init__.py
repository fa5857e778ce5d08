"""Measurements: prompt files, and the speed of speculative against plain decoding."""
