"""What a training leaves on disk, and networks from elsewhere in the same form."""
