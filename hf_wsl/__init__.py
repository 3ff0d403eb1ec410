"""The ground that all packages share, and the door: options, files, errors, workers, and the command line."""
