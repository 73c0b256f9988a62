"""What a caller passes: the model in this package's terms, what it was trained for, and the arguments of a call."""
