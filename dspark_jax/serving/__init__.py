"""A server of OpenAI's interface around an engine."""
