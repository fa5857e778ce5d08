"""Training of drafters: data, anchors, losses, the step, and the loop around it."""
