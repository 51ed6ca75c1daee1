class InputError(ValueError):
    """Something that the user passed cannot work. The message is one sentence: what, its value, and the fix."""
