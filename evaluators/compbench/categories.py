"""T2I-CompBench's categories. Imports nothing, so that plans know them without loading a model's library."""

ATTRIBUTES = ("color", "shape", "texture")
NUMERACY, COMPLEX = "numeracy", "complex"
CATEGORIES = (*ATTRIBUTES, "spatial", "3d_spatial", NUMERACY, "non_spatial", COMPLEX)
