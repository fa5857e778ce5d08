"""Attention of a few query rows a slot against the slot's own cache."""
