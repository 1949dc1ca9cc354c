"""The quantizer: ternary codes for a FLUX transformer from its own activations, one block at a time, without images."""
