"""Image and prompt to score, by benchmark, and the statistics over scores. Knows no Ray."""
