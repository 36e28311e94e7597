"""Files of texts to files of vectors, on one machine or on a cluster."""
