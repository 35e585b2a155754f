"""CADD: masked diffusion over tokens with a continuous companion; without it, plain masked diffusion."""
