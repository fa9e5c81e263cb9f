"""Work on data before training: look at it, divide it, convert it."""
