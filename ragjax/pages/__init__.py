"""What is looked at in a browser: the four stages of an answer, and the report of a run, for files and for the server.

A text from a corpus, a question or a file name is hostile: every value that a template prints goes through
`terminal.visible` and is escaped (`rendering.py`). A page brings its style and script along and forbids all others.
"""
