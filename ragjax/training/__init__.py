"""The loss, the batch, the optimizer and the step."""
