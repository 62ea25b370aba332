"""The packed SAME autoencoder: decoder and encoder."""
