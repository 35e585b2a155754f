"""Feature extractors and the mathematics of distances between sets of features."""
