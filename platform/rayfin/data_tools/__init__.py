"""Work on data before training: look at it, clean, divide and convert it, find duplicates in it."""
