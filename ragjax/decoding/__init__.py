"""Stages 2 to 4: candidates, their marginals, and the choice."""
