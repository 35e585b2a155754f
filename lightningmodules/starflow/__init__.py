"""STARFlow: a latent normalising flow of one deep and several shallow causal transformers."""
