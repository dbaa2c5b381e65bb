"""Files of draft modules: which layout a folder has, what its fields mean, reading and writing."""
