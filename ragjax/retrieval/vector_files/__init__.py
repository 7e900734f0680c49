"""Vectors that somebody else computed, in the files in which they come."""
