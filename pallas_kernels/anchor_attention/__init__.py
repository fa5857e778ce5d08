"""Training attention of many blocks against one context."""

# Under this name policies of jax.checkpoint find what the backward pass needs beside the arguments.
SAVED = "anchor_attention"
