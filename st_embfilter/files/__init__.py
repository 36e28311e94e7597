"""Files of a model, in a folder or on the Hub."""
