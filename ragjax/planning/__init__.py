"""What a run needs of disk, memory and time, before it starts."""
