"""Starting weights for an architecture from trained models of other sizes ("donors")."""
