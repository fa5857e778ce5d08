"""From prompts to text: the decode state, one program a round, and generation on top of it."""
