"""The networks between tokens and latents."""
