"""One algorithm, one file; what they share is in `common` and `optimizer`."""
