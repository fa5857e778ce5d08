"""Verification of drafted blocks over the target's logits: acceptance and the next token."""
