"""How many drafts a round verifies: arrays and seconds in, arrays out; knows no model."""
