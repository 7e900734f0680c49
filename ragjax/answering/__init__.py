"""From a batch of questions to candidates, and the values that come of it."""
