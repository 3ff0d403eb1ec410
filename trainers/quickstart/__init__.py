"""The quickstart: its stages, pictures and report."""
