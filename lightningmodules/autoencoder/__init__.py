"""Training of the autoencoder whose latents other rooms model, and of its decoder on noisy latents."""
