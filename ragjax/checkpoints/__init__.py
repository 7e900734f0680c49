"""Pretrained weights: fetched, opened, read and written."""
