"""What lies on disk and what it becomes here: models, drafters, tokenizers, conversations."""
