"""Exact decoding: the likeliest answer of all, with its proof."""
