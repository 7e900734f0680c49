"""What an evaluation leaves: a line for each question, the metrics that follow, and how two runs compare."""
