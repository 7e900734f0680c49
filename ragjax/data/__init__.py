"""Text: passages, questions, tokens and prompts."""
