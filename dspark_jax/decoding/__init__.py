"""The decisions of a decoding round: arrays in, arrays out; knows no model."""
