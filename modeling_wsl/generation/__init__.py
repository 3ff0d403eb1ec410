"""New weights, from anchors to models that load."""
