"""The one error of the data layer."""


class DataError(ValueError):
    """Data a user named is missing, unreadable or does not fit the model; the command line maps it
    to exit code 2."""
