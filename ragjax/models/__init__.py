"""Encoders and generators, one file a family, and what they are built of."""
