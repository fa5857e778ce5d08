"""Drafters, one module a method."""
