"""One model, looked at closely: `hf-wsl inspect`."""
