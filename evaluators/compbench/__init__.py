"""T2I-CompBench: the rules of its eight categories."""
