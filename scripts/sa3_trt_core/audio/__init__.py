"""Read and write audio files, and run the autoencoder in tiles."""
