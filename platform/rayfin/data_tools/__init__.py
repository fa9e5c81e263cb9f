"""Work on data before training: look at it, divide it, convert it, find duplicates in it."""
