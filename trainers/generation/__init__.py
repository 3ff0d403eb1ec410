"""`hf-wsl generate`."""
