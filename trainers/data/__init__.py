"""What is trained on: windows of weights, images, text."""
