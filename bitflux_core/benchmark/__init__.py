"""What a ternary FLUX saves, measured with random weights of FLUX.1-dev's dimensions: steps, images, small GPUs."""
