"""Image data sets: splits, crops, batches."""
