"""The file formats that weights come in: one module each, which gives the contents of one file."""
