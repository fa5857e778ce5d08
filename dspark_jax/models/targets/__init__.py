"""Target models, one module a family."""
