"""Windows of a tokenized dataset: crops, tables, streams, batches."""
