"""What a 1.58-bit FLUX is, in one process: ternary arithmetic, checkpoints, distillation, generation."""
