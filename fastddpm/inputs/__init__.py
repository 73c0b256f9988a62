"""A caller's input: the model, what it was trained for, and the arguments that several functions share."""
