"""What goes wrong with model files."""


class ModelFileError(ValueError):
    """A model file is missing, damaged, or not one that we can run; the message is one line for the user."""
