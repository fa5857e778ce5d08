"""Training attention of many blocks against one context."""
