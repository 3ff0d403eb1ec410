"""Models of the Hub to a tokenized dataset."""
