"""TarFlow: a normalising flow on image patches made of causal transformers."""
